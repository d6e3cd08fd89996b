"""What every process but the first does under torchrun: gradients of its share, nothing else."""

from __future__ import annotations

import sys
from functools import partial

import torch

from src.compute import runtime
from src.compute.compute_config import Machine
from src.compute.process_group import Team
from src.data.tokens import TokenData, Windows
from src.spec.config import ModelConfig, RunConfig
from src.storage.run_dir import Preemption
from src.train import batch_gradients, build_model, compile_blocks


def assist(run: RunConfig, config: ModelConfig, data: TokenData, team: Team) -> int:
    """Serve rank 0 until it dismisses this process; returns the exit code that it says.

    A signal is passed on with the next gradients: rank 0 decides, saves and dismisses. Raises
    PeerLost where it is gone.
    """
    training = run.training
    assert training.init_seed is not None and training.data_seed is not None
    with Preemption() as stop:
        what, answer = team.hear()
        if what == "end":
            return int(answer)
        machine = Machine(device=team.device, **answer)
        runtime.pin_threads(machine.threads)
        if training.deterministic:
            runtime.deterministic()
        model = build_model(config, training.init_seed).to(machine.device)
        compile_blocks(model, machine)
        windows = Windows(
            data.train.tokens,
            batch_size=training.batch_size,
            seq_len=training.seq_len,
            seed=training.data_seed,
        )
        parameters = list(model.parameters())
        while (message := team.hear())[0] == "step":
            _, step, scale = message
            team.spread(parameters)
            nats = batch_gradients(
                model,
                windows,
                step,
                machine,
                training.z_loss,
                partial(torch.mul, other=scale),
                team,
            )
            team.add_up(parameters, nats, stop.requested)
            model.zero_grad(set_to_none=True)
        if stop.requested:
            print(f"process {team.rank}: stopped by {stop.signal_name}", file=sys.stderr)
        return int(message[1])
