#!/bin/bash
# One stage on several machines under Slurm. It resumes by itself after the time limit, a pre-emption or a failed machine:
#   sbatch --nodes 2 accelerate_configs/slurm.sh scripts/ppo.py --recipe recipes/tldr
#   CONFIG=accelerate_configs/fsdp2.yaml sbatch --nodes 2 accelerate_configs/slurm.sh scripts/sft.py --recipe recipes/tldr
# Submit it from the repository's root, which all machines must see, with the environment active. Options of sbatch, such as
# --partition and --time, go before the script's name. With --gpus-per-node other than 8, so many processes a machine start.
#SBATCH --job-name=rlhf-recipes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# --signal: 600 seconds before the limit this shell gets SIGTERM. An update and its checkpoint must fit into the 600 seconds.

set -u
config=${CONFIG:-accelerate_configs/multi_node.yaml}
stage=$(basename "$1" .py)
name=slurm-$SLURM_JOB_ID # the same after a requeue
state=.slurm-$SLURM_JOB_ID.pid
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

resume=(--run.name "$name")
for run in outputs/*/"$stage/$name"; do
    if [ -f "$run/recipe.resolved.yaml" ]; then
        resume=(--resume "$run")
    fi
done

export CONFIG=$config HEAD=$head STATE=$state PORT=$((20000 + SLURM_JOB_ID % 20000))
# --wait: launchers that have ended do not take the first machine along while it still writes a checkpoint.
srun --kill-on-bad-exit=0 --wait=300 bash -c '
    if [ "$SLURM_NODEID" = 0 ]; then echo $$ >"$STATE"; fi
    exec python -m rlhf_recipes launch --config_file "$CONFIG" \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT" "$@"
' launcher "$@" "${resume[@]}" &
step=$!

asked=
# The first machine is also where this shell runs. Its launcher passes the signal on to its processes, and they tell the others:
# all end with the same update, and save.
trap 'asked=1; echo "SIGTERM: asking the processes to save and end"; kill -TERM "$(cat "$state")"' TERM
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    wait "$step"
    code=$?
done
rm -f "$state"
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then # 75, docs/interruptions.md, or that of a machine which lost the others first
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
