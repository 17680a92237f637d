"""Captions to tokens: DALL·E's vocabulary, trained on its captions, and CLIP's."""
