"""The training of scale_out.py with Hugging Face's accelerate; scale_out.md says how to launch it."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from scale_out import BATCH, corpus, new_model
from torch.nn import functional as F

from lora_kernels import save_lora
from lora_kernels.distributed import shard_dropout


def main(steps, out):
    """Trains and saves the adapter."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # which is what makes two processes on a CPU a group
    if BATCH % accelerator.num_processes:
        raise SystemExit(f"BATCH ({BATCH}) must be a multiple of the processes; got {accelerator.num_processes}")
    model, _ = new_model()
    accelerator.print(f"accelerate on {accelerator.num_processes} x {accelerator.device.type}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Each item is one sequence; a process gets its share of each batch, in order.
    sequences = [sequence for step in range(steps) for sequence in corpus(step)]
    loader = torch.utils.data.DataLoader(sequences, batch_size=BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2), loader)
    if accelerator.num_processes > 1:
        shard_dropout(model)

    for step, batch in enumerate(loader):
        torch.manual_seed(step)
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1:3}  loss {accelerator.reduce(loss.detach(), 'mean').item():.6f}")

    if accelerator.is_main_process:
        save_lora(accelerator.unwrap_model(model), out / "adapter")
    accelerator.wait_for_everyone()  # the adapter is written before a process ends
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("scale_out"))
    args = parser.parse_args()
    main(args.steps, args.out)
