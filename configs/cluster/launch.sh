#!/usr/bin/env bash
# accelerate launch for clusters: SIGTERM and SIGUSR1 reach the training processes, and the exit code is the run's own (75:
# preempted and saved, the same command goes on).
#   configs/cluster/launch.sh OUTPUT --config_file FILE ... -m finetune CONFIG [KEY=VALUE ...]
set -uo pipefail
output=$1
shift

# accelerate's launcher for one process dies of these signals and passes none on, so it is told to ignore them, and the
# whole process group gets them. Its launcher for several processes, which is torchrun's, handles them itself; it gives its
# processes this many seconds to save, and the run keeps within that.
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SECONDS_TO_SAVE:-240}
# torch 2.13: a restart over several machines would read the last attempt's addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

setsid bash -c 'trap "" TERM USR1; exec accelerate launch "$@"' launch "$@" output="$output" \
    faults.stop_within=$((TORCH_ELASTIC_SHUTDOWN_TIMEOUT - 20)) &
run=$!
trap 'kill -TERM -- "-$run"' TERM
trap 'kill -USR1 -- "-$run"' USR1
while kill -0 "$run" 2>/dev/null; do wait "$run"; done  # a signal ends `wait`, not the run

exec trainworks outcome "$output"
