"""Gaussian diffusion for every stage that denoises: embeddings (priors) and images (decoder, upsamplers).

- `schedules`: ᾱ of every timestep, noising, what the model's prediction means
- `grids`: which timesteps a sampler visits
- `steps`: one step of DDPM, of DDIM and of its inversion; guidance; clipping
- `solvers`: those of `diffusers`, on our schedules
- `analytic`: the reverse variance of Analytic-DPM, measured on training data
- `losses`: what training minimizes

Everything here is pure: noise is passed in, and tables are float64, so that a step does not depend on the device.
"""

from dalle_ds.diffusion.analytic import AnalyticVariance, ScoreMoments
from dalle_ds.diffusion.grids import step_grid
from dalle_ds.diffusion.losses import hybrid_loss, simple_loss
from dalle_ds.diffusion.schedules import NoiseSchedule, Prediction, noise_schedule
from dalle_ds.diffusion.solvers import dpm_solver
from dalle_ds.diffusion.steps import clip_x0, ddim_inversion_step, ddim_step, ddpm_step, guide

__all__ = [
    "AnalyticVariance",
    "NoiseSchedule",
    "Prediction",
    "ScoreMoments",
    "clip_x0",
    "ddim_inversion_step",
    "ddim_step",
    "ddpm_step",
    "dpm_solver",
    "guide",
    "hybrid_loss",
    "noise_schedule",
    "simple_loss",
    "step_grid",
]
