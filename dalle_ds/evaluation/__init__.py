"""Measuring what trained models can do."""
