"""What a run takes of memory, network and time.

`trace.py` and `model.py` measure any task's own module on torch's "meta" device: parameters, what passes hold, operations,
collectives. What DeepSpeed does beside has no module to measure: `memory.py` and `traffic.py` have formulas for ZeRO,
offload, pipelines and PowerSGD, and turn all of it into seconds on a `Cluster`; these and the tables are most of this package.
`benchmarks/plan_check.py` holds plans against real engines. Nothing here imports DeepSpeed or needs a GPU.
"""
