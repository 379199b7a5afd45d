"""Trains a domain of a model in two processes, by DDP or FSDP, and saves the tensors: MODE FOLDER OUTPUT."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from samoe_hf import SamoeModel

mode, folder, output = sys.argv[1:]
dist.init_process_group("gloo")
model = SamoeModel.from_pretrained(folder).train()
model.set_trainable("domain:b")
model.wake_experts()
if mode == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
else:
    mesh = init_device_mesh("cpu", (2,))
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
torch.manual_seed(int(os.environ["RANK"]))
labels = torch.zeros(1, 1, 3, 128, 128, dtype=torch.bool)
labels[..., 20:70, 30:90] = True
for _ in range(2):
    model(torch.randn(1, 3, 3, 128, 128), labels, domain="b").loss.backward()
    optimizer.step()
    optimizer.zero_grad()
tensors = {n.removeprefix("module."): x for n, x in model.state_dict().items()}
tensors = {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in tensors.items()}
if dist.get_rank() == 0:
    torch.save(tensors, output)
dist.destroy_process_group()
