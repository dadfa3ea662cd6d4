# Sourced by train_stage{1,2,3,4}.sh: `train_stage N ARGUMENTS…` runs one stage.
#   RECIPE           recipe file (default configs/stages/stageN_7b.yaml); a first argument ending in .yaml does the same
#   NUM_GPUS         GPUs to use (default: all that CUDA_VISIBLE_DEVICES leaves visible)
#   NPROC            processes to launch instead, for a CPU
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines, on each of which the same is started: how many, which
#                    one this is (from 0), and where machine 0 is reached (port 29500 unless given); see docs/scale.md
#   other arguments  key=value overrides, --resume, --check
# Paths of the 7B recipes: MEDPLIB_LLAMA, MEDPLIB_LLAVA, MEDPLIB_CLIP, MEDPLIB_SAM, MEDPLIB_DATA, MEDPLIB_IMAGES.

train_stage() {
  stage=$1
  shift
  recipe=${RECIPE:-configs/stages/stage${stage}_7b.yaml}
  case ${1:-} in
    *.yaml | *.yml) recipe=$1; shift ;;
  esac
  if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
  fi
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())' 2> /dev/null) || {
    echo "There is no python with PyTorch here; bash scripts/test.sh makes .venv, or: pip install -e '.[train]'" >&2
    return 2
  }
  processes=${NPROC:-${NUM_GPUS:-$gpus}}
  nodes=${NNODES:-1}
  case $processes in
    '' | *[!0-9]*) echo "NPROC or NUM_GPUS is '$processes'; expected a whole number" >&2; return 2 ;;
  esac
  case " $* " in
    *" --check "*) exec python -m model.train "$recipe" "$@" --processes "$((processes > 0 ? processes * nodes : 1))" ;;
  esac
  # exec: a termination signal reaches the run, which saves before it ends, and not a shell that waits for it.
  if [ "$processes" -le 1 ] && [ "$nodes" -le 1 ]; then
    exec python -m model.train "$recipe" "$@"
  fi
  if [ "$nodes" -gt 1 ]; then
    if [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; then
      echo "NNODES is $nodes; set NODE_RANK (0 to $((nodes - 1))) and MASTER_ADDR (where machine 0 is reached), too" >&2
      return 2
    fi
    place="--nnodes $nodes --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port ${MASTER_PORT:-29500}"
  else
    place=--standalone
  fi
  # Check first, in one process: what is wrong is told once, not by every rank, and before any launcher starts.
  python -m model.train "$recipe" "$@" --check --quiet --processes "$((processes * nodes))" || return $?
  # Many processes of many threads each are ruinous; one thread a process unless told otherwise. The launcher is torch's:
  # DeepSpeed's own would use the first GPUs of the machine whatever CUDA_VISIBLE_DEVICES says.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  # What a run needs to save after a termination signal; torch would kill it after 30 seconds.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
  # shellcheck disable=SC2086  # several words
  exec python -m torch.distributed.run $place --nproc_per_node "$processes" -m model.train "$recipe" "$@"
}
