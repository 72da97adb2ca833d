"""What does every script for Slurm say in the same words? Bash, 4.4 or newer; what begins with @ is filled in."""

from __future__ import annotations

STOP = r"""# What runs here: the launcher, and an srun an island.
pids=()
ended=
stop() {
    kill "${pids[@]}" 2>/dev/null || true
}
trap 'ended=limit; stop' USR1       # Slurm's word before the time limit
trap 'ended=cancelled; stop' TERM
gone() { # seconds to wait at most until none of these processes is left
    timeout "$1" bash -c 'while kill -0 "$@"; do sleep 0.2; done' _ "${@:2}" 2>/dev/null
}
newest() { # the newest checkpoint that all islands have written
    local mark found=none
    for mark in "$run"/checkpoints/step_*/COMMIT; do
        found=$mark
    done
    echo "$found"
}
before=$(newest)"""

LAUNCHER = r"""# The launcher: it owns the meeting point, commits checkpoints (every @every steps), and ends when the run does.
resume=()
if [[ -e $run/job.toml ]]; then
    resume=(--resume)
fi
dtrain run "${job[@]}" "${resume[@]}" &
main=$!
pids+=("$main")"""

ALONE = """main=${pids[0]}    # nothing but the island is here"""

JOIN = r"""# An island of one node: dtrain starts its torchrun there, and joins the launcher.
join() { # island, where
    srun "${options[@]}" --nodes=1 --ntasks=1 "$2" --output="$logs/island$1-%N.log" \
        dtrain run "${job[@]}" --island "$1" --meet "$meet" &
    pids+=("$!")
}"""

TORCHRUNS = r"""# An island of several nodes: a torchrun on each. They come together at the first, and start when the launcher is there.
torchruns() { # island, its first node, its nodes, ranks a node, network interface, where
    # shellcheck disable=SC2016  # each node has a SLURM_NODEID of its own
    DTRAIN_RUN=$run DTRAIN_JOB=$run/job.toml DTRAIN_ISLAND=$1 DTRAIN_NUM_ISLANDS=@islands DTRAIN_MEET=$meet \
        GLOO_SOCKET_IFNAME=$5 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1 \
        srun "${options[@]}" --nodes="$3" --ntasks="$3" "$6" --output="$logs/island$1-%N.log" \
        bash -c 'exec python -m dtrain.launch.told @timeout_s "$SLURM_NODEID" \
            python -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' _ \
        --nnodes="$3" --nproc-per-node="$4" --rdzv-backend=static --rdzv-endpoint="$2:$((port + 1))" \
        --rdzv-id="$SLURM_JOB_ID" --max-restarts=0 --log-dir="$run/logs/island$1/torchrun" --redirects=3 \
        -m dtrain.launch train "$run/job.toml" &
    pids+=("$!")
}"""

NODES = r"""# The nodes of this job, cut into groups.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes() { # the first of a group from 0, and how many
    local IFS=,
    echo "${hosts[*]:$1:$2}"
}"""

END = r"""# Until the run has ended, or an island has failed.
failed=0
while ((failed == 0)) && [[ -z $ended ]] && kill -0 "$main" 2>/dev/null; do
    wait -n || failed=$?
done
if ((failed)) && [[ -z $ended ]]; then
    gone 15 "$main" || stop    # the launcher may know more of why, and says so first
fi
status=0
wait "$main" || status=$?
gone 30 "${pids[@]}" || stop
wait || true
if ((status == 143 && failed)); then
    status=$failed    # it was stopped here, for an island's sake
fi

# Back into the queue at the time limit, and after a failure where a checkpoint is newer than this start: no fault repeats for ever.
if [[ $ended == cancelled ]]; then
    exit 143
elif [[ $ended == limit ]]; then
    echo "stopped before the time limit; the run goes on from its newest checkpoint when the job starts again"
elif ((status == 0 || status == 2)) || [[ $(newest) == "$before" ]]; then
    exit "$status"
else
    echo "ended with status $status; the run goes on from its newest checkpoint when the job starts again"
fi
scontrol requeue "${SLURM_JOB_ID}"
"""
