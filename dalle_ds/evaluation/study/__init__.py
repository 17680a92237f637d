"""Studies of human preference (DALL·E App. F, unCLIP §5.2).

- `pages`: pairs of pictures as pages that work offline
- `votes`: what voters saved, counted
"""
