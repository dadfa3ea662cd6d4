#!/bin/sh
# Answer a data file in chunks, one process a device, and join the chunks at the end.
#
#   MODEL=DIR DATA=FILE IMAGES=DIR ANSWERS=FILE.jsonl GPUS=0,1,2 sh model/eval/infer_parallel_medplib.sh [flags of vqa_infer]
#
# MODEL      checkpoint (the nano that ships with the project)
# DATA       JSON, JSONL or Parquet file (the phantom sample's held-out questions)
# IMAGES     folder its paths start from (the folder of DATA)
# ANSWERS    file of the joined answers (runs/infer/MODEL/DATA.jsonl)
# GPUS       GPUs to use, with commas or spaces; all that CUDA_VISIBLE_DEVICES or nvidia-smi names when absent
# CPU_PROCESSES  so many processes on the CPU instead
# VISION_TOWER, SAM  CLIP directory and SAM-Med2D file, for published checkpoints that need them
# PYTHON     the interpreter (python)
#
# Every chunk writes its answers and its log beside ANSWERS. A chunk that was stopped goes on when the same command is
# given again; finished ones are not asked again. Exit codes: 0 every question is answered, 1 a chunk failed,
# 2 something was wrong with what was asked for, 3 some questions could not be answered.

set -u

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH='' cd -- "$here/../.." && pwd)
MODEL=${MODEL:-$root/assets/medplib-mini}
DATA=${DATA:-$root/data/sample/held_out.json}
IMAGES=${IMAGES:-$(dirname -- "$DATA")}
PYTHON=${PYTHON:-python}
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

refuse() {
    echo "infer_parallel: $1" >&2
    exit 2
}

stem=$(basename -- "$DATA")
if [ -z "${ANSWERS:-}" ]; then
    name=$("$PYTHON" -c 'import sys; from model.checkpoint.directories import checkpoint_name as name; print(name(sys.argv[1]))' \
        "$MODEL") || refuse "the answers' folder has no name; set ANSWERS"
    ANSWERS=runs/infer/$name/${stem%.*}.jsonl
fi
overwrite=
scores=
for flag in "$@"; do
    case $flag in
        --version* | --val_data_path* | --image_folder* | --vision_tower* | --vision_pretrained*)
            refuse "$flag is set by MODEL, DATA, IMAGES, VISION_TOWER and SAM; leave it out" ;;
        --answers-file* | --answers_file*) refuse "$flag is set by ANSWERS; leave it out" ;;
        --num-chunks* | --num_chunks* | --chunk-idx* | --chunk_idx*) refuse "$flag is set for every chunk; leave it out" ;;
        --device* | --cpu_only) refuse "$flag is set by GPUS or CPU_PROCESSES; leave it out" ;;
        --overwrite) overwrite=--overwrite ;;
        --eval_seg | --eval_vqa) scores="$scores $flag" ;;
    esac
done

# One word a process: the number of a GPU, or cpu.
if [ -n "${CPU_PROCESSES:-}" ]; then
    [ -z "${GPUS:-}" ] || refuse "GPUS and CPU_PROCESSES are both set; give one of them"
    case $CPU_PROCESSES in
        *[!0-9]* | 0*) refuse "CPU_PROCESSES is $CPU_PROCESSES; give a number of processes" ;;
    esac
    devices=$(awk -v n="$CPU_PROCESSES" 'BEGIN { while (n-- > 0) print "cpu" }')
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    threads=$((cores / CPU_PROCESSES))
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    export OMP_NUM_THREADS
else
    gpus=${GPUS:-${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)}}
    devices=$(printf '%s\n' "$gpus" | tr ', ' '\n\n' | sed '/^$/d')
    [ -n "$devices" ] || refuse "no GPU was found; name them with GPUS=0,1 or set CPU_PROCESSES=2"
fi
count=$(printf '%s\n' "$devices" | wc -l)
count=$((count))
mkdir -p -- "$(dirname -- "$ANSWERS")" || refuse "cannot make the folder of $ANSWERS"
if [ -e "$ANSWERS" ] && [ -z "$overwrite" ]; then
    refuse "$ANSWERS is there already; set ANSWERS to another file, or give --overwrite"
fi

chunk_path() {
    printf '%s.chunk-%s-of-%s.%s' "${ANSWERS%.*}" "$1" "$count" "$2"
}

run_chunk() { # index device flags…
    index=$1
    device=$2
    shift 2
    if [ "$device" = cpu ]; then
        CUDA_VISIBLE_DEVICES=
    else
        CUDA_VISIBLE_DEVICES=$device
    fi
    export CUDA_VISIBLE_DEVICES
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    [ -z "${VISION_TOWER:-}" ] || set -- "--vision_tower=$VISION_TOWER" "$@"
    [ -z "${SAM:-}" ] || set -- "--vision_pretrained=$SAM" "$@"
    if [ "$device" = cpu ]; then set -- --device=cpu "$@"; else set -- --device=cuda "$@"; fi
    exec "$PYTHON" "$here/vqa_infer.py" "--version=$MODEL" "--val_data_path=$DATA" "--image_folder=$IMAGES" \
        "--answers-file=$(chunk_path "$index" jsonl)" "--num-chunks=$count" "--chunk-idx=$index" "$@"
}

pids=
stop() {
    trap - INT TERM
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill $pids 2>/dev/null
    wait
    echo "infer_parallel: stopped; give the same command again to go on" >&2
    exit 130
}
trap stop INT TERM

index=0
for device in $devices; do
    log=$(chunk_path "$index" log)
    run_chunk "$index" "$device" "$@" >"$log" 2>&1 &
    pids="$pids $!"
    echo "chunk $index of $count on $device, log in $log"
    index=$((index + 1))
done

failed=
index=0
for pid in $pids; do
    wait "$pid"
    code=$?
    if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then
        failed="$failed $index"
        echo "infer_parallel: chunk $index of $count failed with exit code $code; the end of its log:" >&2
        tail -n 15 -- "$(chunk_path "$index" log)" | sed 's/^/    /' >&2
    fi
    index=$((index + 1))
done
if [ -n "$failed" ]; then
    echo "infer_parallel: failed chunks:$failed of $count; nothing was joined, give the same command again to go on" >&2
    exit 1
fi

set --
index=0
while [ "$index" -lt "$count" ]; do
    set -- "$@" "$(chunk_path "$index" jsonl)"
    index=$((index + 1))
done
# shellcheck disable=SC2086
"$PYTHON" -m model.eval.join_chunks $overwrite $scores -- "$ANSWERS" "$@"
code=$?
if [ "$code" -eq 0 ] || [ "$code" -eq 3 ]; then
    index=0
    while [ "$index" -lt "$count" ]; do
        rm -f -- "$(chunk_path "$index" log)"
        index=$((index + 1))
    done
fi
exit "$code"
