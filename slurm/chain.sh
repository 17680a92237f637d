#!/usr/bin/env bash
# Submits a whole DALL·E: tokenizer → dVAE → codes → transformer → evaluation; or a whole unCLIP: tokenizer → CLIP → embeddings →
# prior and decoder side by side, both upsamplers beside all of it → one folder of them → evaluation. Each stage waits for those before; where one
# fails, those after it leave the queue. Given again, it goes on where it was stopped: stages that are done end at once.
#
#   slurm/chain.sh PRESET DATA OUT [--system dalle|unclip]
#
# DATA is what launchers/prepare_data.py made, or several of these with commas between; evaluation is on the first. Given
# PREPARE_ARGS='--corpus C --source S', the first is made where it is not there, in SHARES jobs at a time; for the paper's
# presets (dalle-*) with the paper's filters. OUT gets tokenizer.model, dvae/, transformer/, report/ and logs/. What the
# launchers get besides: TOKENIZER_ARGS, DVAE_ARGS, CODES_ARGS, TRANSFORMER_ARGS, CLIP_ARGS, EVALUATE_ARGS; sbatch, for all
# stages: SBATCH_ARGS. CLIP=PRESET also trains the CLIP of that preset, into clip/, and evaluates the best of 1, 8 and 64 by it.
# Of an unCLIP, OUT gets tokenizer.model, clip/, prior/, decoder/, upsampler_1/, upsampler_2/ and all of them as unclip/; the
# launchers get EMBEDDINGS_ARGS, PRIOR_ARGS, DECODER_ARGS, UPSAMPLER_1_ARGS and UPSAMPLER_2_ARGS.
# AFTER=JOB waits for a job first, such as the last one of slurm/prepare.sh. Prints stages and job numbers.
system=dalle arguments=()
while (($#)); do
    case $1 in
        --system) system=${2:-none} && shift "$(($# > 1 ? 2 : 1))" ;;
        *) arguments+=("$1") && shift ;;
    esac
done
set -- ${arguments[@]+"${arguments[@]}"}
[[ $# == 3 && $system =~ ^(dalle|unclip)$ ]] || { sed -n '2,/^[^#]/{/^#/p}' "$0" >&2; exit 2; }
mkdir -p "$3" && out=$(CDPATH='' cd "$3" && pwd) || exit
preset=$1
IFS=, read -ra data <<< "$2"
export DALLE_LOGS=$out/logs
source "$(dirname "$0")/common.sh"

jobs=() last=${AFTER:-} judged=()
trap '((${#jobs[@]} == 0)) || scancel "${jobs[@]}"' EXIT # all stages or none

stage() {
    local name=$1 request=()
    shift
    [[ -z $last ]] || request=(--dependency="afterok:$last" --kill-on-invalid-dep=yes)
    [[ ! $name =~ ^(tokenizer|codes|unclip)$ ]] || request+=(--nodes=1) # one process, whatever SBATCH_ARGS has for the others
    # shellcheck disable=SC2086 # options, several in a word
    last=$("$DALLE_ROOT/slurm/submit.sh" ${SBATCH_ARGS:-} ${request[@]+"${request[@]}"} "$DALLE_ROOT/slurm/${name%_[12]}.sbatch" "$@")
    jobs+=("$last")
    printf '%-12s %s\n' "$name" "$last"
}

# shellcheck disable=SC2086
submit_dalle() {
    stage dvae --preset "$preset" --deepspeed_config "$zero1" \
        --data "${data[@]}" --run_dir "$out/dvae" ${DVAE_ARGS:-}
    for folder in "${data[@]}"; do
        stage codes --out "$folder" --cache_codes "$out/dvae" ${CODES_ARGS:-}
    done
    stage transformer --preset "$preset" --deepspeed_config "$zero3" \
        --data "${data[@]}" --dvae "$out/dvae" --tokenizer "$out/tokenizer.model" --run_dir "$out/transformer" ${TRANSFORMER_ARGS:-}
    if [[ -n ${CLIP:-} ]]; then
        stage clip --preset "$CLIP" --deepspeed_config "$zero1" \
            --data "${data[@]}" --tokenizer "$out/tokenizer.model" --run_dir "$out/clip" ${CLIP_ARGS:-}
        judged=(--clip "$out/clip" --best_of "1,8,64")
    fi
    stage evaluate --data "${data[0]}" --dvae "$out/dvae" --transformer "$out/transformer" --out "$out/report" \
        ${judged[@]+"${judged[@]}"} ${EVALUATE_ARGS:-}
}

# shellcheck disable=SC2086
submit_unclip() {
    local folder before=$last after=
    local given=(--preset "$preset" --deepspeed_config "$zero3" --data "${data[@]}")
    stage upsampler_1 --stage 64-256 "${given[@]}" --run_dir "$out/upsampler_1" ${UPSAMPLER_1_ARGS:-}
    after+=:$last last=$before
    stage upsampler_2 --stage 256-1024 "${given[@]}" --run_dir "$out/upsampler_2" ${UPSAMPLER_2_ARGS:-}
    after+=:$last last=$before
    stage clip --preset "$preset" --deepspeed_config "$zero1" --data "${data[@]}" --tokenizer "$out/tokenizer.model" \
        --run_dir "$out/clip" ${CLIP_ARGS:-}
    for folder in "${data[@]}"; do
        stage embeddings --out "$folder" --cache_embeddings "$out/clip" ${EMBEDDINGS_ARGS:-}
    done
    local embedded=("${given[@]}" --clip "$out/clip" --tokenizer "$out/tokenizer.model")
    before=$last
    stage prior "${embedded[@]}" --run_dir "$out/prior" ${PRIOR_ARGS:-}
    after+=:$last last=$before
    stage decoder "${embedded[@]}" --run_dir "$out/decoder" ${DECODER_ARGS:-}
    last=${after#:}:$last
    stage unclip --prior "$out/prior" --decoder "$out/decoder" --upsampler "$out/upsampler_1" --upsampler "$out/upsampler_2" \
        --out "$out/unclip"
    stage evaluate --data "${data[0]}" --unclip "$out/unclip" --captions 1000 --out "$out/report" ${EVALUATE_ARGS:-}
}

zero1=$DALLE_ROOT/ds_configs/zero1_fp32.json zero3=$DALLE_ROOT/ds_configs/zero3_auto.json
# shellcheck disable=SC2086
{
    if [[ -n ${PREPARE_ARGS:-} && ! -f ${data[0]}/info.json ]]; then
        filters=()
        [[ $preset != dalle-* || "$PREPARE_ARGS " =~ --filters\.(none|paper)[\ =] ]] || filters=(--filters.paper True)
        prepared=$(SBATCH_ARGS="${SBATCH_ARGS:-} --nodes=1 ${last:+--dependency=afterok:$last --kill-on-invalid-dep=yes}" \
            "$DALLE_ROOT/slurm/prepare.sh" "${SHARES:-1}" --out "${data[0]}" ${filters[@]+"${filters[@]}"} ${PREPARE_ARGS})
        jobs+=(${prepared})
        last=${jobs[${#jobs[@]} - 1]}
        printf '%-12s %s\n' prepare_data "$last"
    fi
    [[ -f $out/tokenizer.model ]] || stage tokenizer --preset "$preset" --data "${data[@]}" --out "$out/tokenizer.model" \
        ${TOKENIZER_ARGS:-}
    if [[ $system == unclip ]]; then
        submit_unclip
    else
        submit_dalle
    fi
}
trap - EXIT
echo "how it is doing: slurm/status.sh $out" >&2
