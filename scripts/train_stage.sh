# Sourced by train_stage{1,2,3,4}.sh: `train_stage N ARGUMENTS…` runs one stage.
#   RECIPE           recipe file (default configs/stages/stageN_7b.yaml); a first argument ending in .yaml does the same
#   NUM_GPUS         GPUs to use (default: all visible)
#   NPROC            processes to launch instead, for a CPU
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
  # Check first, in one process: a wrong path is told once, not by every rank, and before any launcher starts.
  python -m model.train "$recipe" "$@" --check || return $?
  gpus=${NUM_GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
  processes=${NPROC:-$gpus}
  if [ "$processes" -le 1 ]; then
    python -m model.train "$recipe" "$@"
  elif [ -z "${NPROC:-}" ] && command -v deepspeed > /dev/null; then
    deepspeed --num_gpus "$processes" --module model.train "$recipe" "$@"
  else
    # Many processes of many threads each are ruinous; one thread a process unless told otherwise.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone --nproc_per_node "$processes" -m model.train "$recipe" "$@"
  fi
}
