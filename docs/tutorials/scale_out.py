"""LoRA fine-tuning on one process or many; scale_out.md walks through it.

torchrun --nproc-per-node 2 docs/tutorials/scale_out.py --parallel fsdp
"""

import argparse
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import add_lora, save_lora
from lora_kernels.distributed import LoRAColwiseParallel, LoRARowwiseParallel, shard_dropout

WIDTH, HEAD, VOCABULARY = 64, 16, 64
BATCH, LENGTH = 16, 32  # of all processes together, whatever their number


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm1(x)
        # -1 heads: under tensor parallel q_proj, k_proj and v_proj give this process its share of them.
        q, k, v = (p(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small decoder, of random numbers here; yours is loaded from where it lies."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def new_model():
    """The base and its adapters: the same numbers in every process, since each draws them from the same seed."""
    torch.manual_seed(0)
    model = Transformer()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up", "down"]
    return model, add_lora(model, r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets)


def corpus(step):
    """A batch that only the step decides: sequences that count in ones, twos or threes, beginning anywhere."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return (first + stride * torch.arange(LENGTH + 1)) % VOCABULARY


# Tensor parallel: which linears are cut along their outputs, and which, reading those, along their inputs.
COLWISE, ROWWISE = ("q_proj", "k_proj", "v_proj", "up"), ("o_proj", "down")
PLAN = {f"blocks.*.{name}": LoRAColwiseParallel() for name in COLWISE}
PLAN |= {f"blocks.*.{name}": LoRARowwiseParallel() for name in ROWWISE}


def parallelise(model, mesh, args):
    """What is called in training: the model itself, its parameters sharded, or a wrapper around it."""
    shard_dropout(model, mesh["dp"])  # the masks of one process with the whole batch
    if "tp" in args.parallel:
        parallelize_module(model, mesh["tp"], PLAN)
    if "fsdp" in args.parallel:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
        fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    return DistributedDataParallel(model) if args.parallel == "ddp" else model


def processes_per_part(args, processes):
    """How many processes share a part of the batch; what would train on another batch than one process is refused."""
    cut = {"none": 1, "ddp": 1, "fsdp": 1, "tp": processes, "fsdp+tp": 2}[args.parallel]
    if args.parallel == "none" and processes > 1:
        raise SystemExit(f"--parallel none needs one process; got {processes}: each would train alone")
    if args.bf16 and "fsdp" not in args.parallel:
        raise SystemExit(f"--bf16 needs fsdp; got --parallel {args.parallel}")
    if processes % cut:
        raise SystemExit(f"--parallel fsdp+tp needs an even number of processes; got {processes}")
    if BATCH % (processes // cut):
        raise SystemExit(f"BATCH ({BATCH}) must be a multiple of the data-parallel ranks; got {processes // cut}")
    if (WIDTH // HEAD) % cut:
        raise SystemExit(f"the {WIDTH // HEAD} heads must be a multiple of the tensor-parallel ranks; got {cut}")
    return cut


def main(args):
    """Trains, saves a checkpoint and the adapter."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    cut = processes_per_part(args, processes)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group()  # NCCL for what lies on GPUs, gloo for what does not
    first = distributed.get_rank() == 0
    mesh = init_device_mesh(device.type, (processes // cut, cut), mesh_dim_names=("dp", "tp"))

    model, report = new_model()
    if first:
        print(f"{args.parallel} on {processes} x {device.type}: {report.trainable:,} parameters are trained")
    model = parallelise(model.to(device), mesh, args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)

    # Adapters and optimiser, each process its part; another number of processes, or another form, can load them.
    only_adapters, start = StateDictOptions(ignore_frozen_params=True, strict=False), 0
    if args.resume is not None:
        of_model, of_optimizer = get_state_dict(model, optimizer, options=only_adapters)
        state = {"model": of_model, "optimizer": of_optimizer, "step": torch.zeros(())}
        checkpoint.load(state, checkpoint_id=args.resume)
        set_state_dict(
            model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=only_adapters
        )
        start = int(state["step"])

    for step in range(start, args.steps):
        torch.manual_seed(step)  # the same in all processes, which share masks, and the same after --resume
        batch = corpus(step).chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()].to(device)
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        distributed.all_reduce(total)
        if first:
            print(f"step {step + 1:3}  loss {total.item() / processes:.6f}")

    of_model, of_optimizer = get_state_dict(model, optimizer, options=only_adapters)
    state = {"model": of_model, "optimizer": of_optimizer, "step": torch.tensor(float(args.steps))}
    checkpoint.save(state, checkpoint_id=args.out / f"checkpoint-{args.steps}")
    if first or args.parallel not in ("none", "ddp"):  # what is sharded, all gather together and the first one writes
        save_lora(model, args.out / "adapter")
    # Gloo's workers outlive their groups; one that lets go of its last tensor while the interpreter ends aborts it
    # (pytorch/pytorch#190489). A barrier lets it do so before, and each group has workers of its own.
    for group in (None, *mesh.get_all_groups()):
        distributed.barrier(group)
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", choices=["none", "ddp", "fsdp", "tp", "fsdp+tp"], default="none")
    parser.add_argument("--bf16", action="store_true", help="with fsdp: parameters are gathered and used in bfloat16")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--resume", type=Path, help="the checkpoint to go on from, such as scale_out/checkpoint-30")
    parser.add_argument("--out", type=Path, default=Path("scale_out"))
    main(parser.parse_args())
