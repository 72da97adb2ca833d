"""What does every script for Slurm say in the same words? Bash, 4.4 or newer; what begins with @ is filled in."""

from __future__ import annotations

STOP = r"""# What runs here: the launcher, and for each island what joins it.
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
"""

NEWEST = r"""newest() { # the newest checkpoint that counts
    local mark found=none
    for mark in @kept/checkpoints/step_*/COMMIT; do
        found=$mark
    done
    echo "$found"
}
before=$(newest)
"""

COMMITS = "owns the meeting point, commits checkpoints (every @every steps), and ends when the run does."
COMMITS_NONE = "owns the meeting point, and ends when the run does."

LAUNCHER = r"""# The launcher: it @does
go_on "$run"
dtrain run "${job[@]}"@config "${resume[@]}" "${script[@]}" &
main=$!
pids+=("$main")"""

ALONE = """main=${pids[0]}    # nothing but the island is here"""

GO_ON = r"""go_on() { # with the run that this folder holds, if it does
    resume=()
    if [[ -e $1/job.toml ]]; then
        resume=(--resume)
    fi
}"""

JOIN = r"""# An island of one node: dtrain joins the launcher from there, and starts its torchrun.
join() { # island, where
    go_on "$run-island$1"
    srun "${options[@]}" --nodes=1 --ntasks=1 "$2" --output="$logs/island$1-%N.log" \
        dtrain run "${job[@]}" --island "$1" --meet "$meet" "${resume[@]}" "${script[@]}" &
    pids+=("$!")
}"""

TORCHRUNS = r"""# An island of several nodes: dtrain joins the launcher from here, and starts a torchrun on each.
torchruns() { # island, its first node, its nodes, ranks a node, where
    # shellcheck disable=SC2016  # each node has a SLURM_NODEID of its own
    local words=(
        srun "${options[@]}" --nodes="$3" --ntasks="$3" "$5" --output="$logs/island$1-%N.log"
        bash -c 'exec env -u DTRAIN_PARENT python -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' _
        --nnodes="$3" --nproc-per-node="$4" --rdzv-backend=static --rdzv-endpoint="$2:$((port + 1))"
    )
    go_on "$run-island$1"
    # As Python quotes: bash writes what is no letter in its locale in a way of its own.
    DTRAIN_TORCHRUN=$(python3 -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "${words[@]}") \
        dtrain run "${job[@]}" --island "$1" --meet "$meet" "${resume[@]}" "${script[@]}" >"$logs/island$1.log" 2>&1 &
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
if ((status == 143 && failed)) && [[ -z $ended ]]; then
    status=$failed    # it was stopped here, for an island's sake
fi
"""

AGAIN = r"""
# Back into the queue where a checkpoint is newer than this start, at the time limit as after a failure, so that none is repeated
# for ever; and where Slurm took the nodes for another job, which says nothing of this one.
preempted() {
    [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]
}
if [[ $ended == cancelled ]]; then
    exit 143
elif ((status == 0 || status == 2)); then
    exit "$status"
elif [[ $(newest) != "$before" ]]; then
    echo "ended${ended:+ before the time limit} with status $status; the run goes on from its newest checkpoint"
elif preempted; then
    echo "preempted before its first checkpoint; the run begins where it began this time"
else
    echo "status $status, and not queued again: no checkpoint is newer than this start (train.checkpoint_every = @every)"
    exit "$status"
fi
scontrol requeue "$SLURM_JOB_ID"
"""

NEVER_AGAIN = r"""
# Never back into the queue: dtrain has no checkpoint of @what, and would begin it anew each time.
if [[ $ended == limit ]]; then
    echo "stopped before the time limit, and not queued again: dtrain has no checkpoint of @what"
fi
if [[ -n $ended ]]; then
    exit 143
fi
exit "$status"
"""
