"""Which of the training timesteps a sampler visits."""

from __future__ import annotations

import re

from dalle_ds.errors import ConfigError


def step_grid(spec: int | str, steps: int) -> list[int]:
    """Timesteps of a sampler, rising.

    Args:
        spec: one of
            N or "N": N timesteps, evenly spaced from the first to the last, rounded;
            "N,M,…": as many equal segments, N timesteps of the first (least noisy) one, M of the second, …, each as above;
            "fast27": GLIDE's released "10,10,3,2,2" with the last timestep moved by 2;
            "strided N": every k-th timestep from 0, N = ⌈steps / k⌉ of them, as DDIM has it.
        steps: timesteps of the schedule.

    Raises:
        ConfigError: a spec of another form, or more timesteps than there are.
    """
    text = str(spec).strip()
    if text == "fast27":
        *rest, last = step_grid("10,10,3,2,2", steps)
        if last - 2 <= rest[-1]:
            raise ConfigError(f"the grid fast27 needs more timesteps than {steps}")
        return [*rest, last - 2]
    if found := re.fullmatch(r"strided (\d+)", text):
        count = int(found[1])
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ConfigError(
            f"no whole stride through {steps} timesteps makes {count}: take another number, or {count} (evenly spaced)"
        )
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f'a step grid is "N", "N,M,…", "strided N" or "fast27", found {spec!r}')
    counts = [int(count) for count in text.split(",")]
    grid: list[int] = []
    start = 0
    for number, count in enumerate(counts):
        size = steps // len(counts) + (number < steps % len(counts))
        if not 1 <= count <= size:
            raise ConfigError(f"step grid {spec!r}: segment {number + 1} has {size} timesteps and cannot give {count}")
        spacing = (size - 1) / max(1, count - 1)
        grid += [start + round(place * spacing) for place in range(count)]
        start += size
    return grid
