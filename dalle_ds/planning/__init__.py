"""What a run takes of memory, network and time, from formulas that are held against real runs (`benchmarks/plan_check.py`).

Nothing here imports DeepSpeed or needs a GPU.
"""
