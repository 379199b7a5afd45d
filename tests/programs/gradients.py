"""The gradients of a batch of two clips, by one process, by two with DDP, or by two with FSDP.

python gradients.py one|ddp|fsdp MODEL OUTPUT.pt
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoProcessor

from samoe_hf import SamoeModel
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos
from samoe_hf.evaluation.evaluate import segment_video

mode, folder, output = sys.argv[1:]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# In float64, where rounding does not tip the routers' discontinuous choice of experts.
model = SamoeModel.from_pretrained(folder, dtype=torch.float64).train()
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
    if hasattr(module, "dropout_p"):
        module.dropout_p = 0.0
if world > 1:
    dist.init_process_group("gloo")
if mode == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
if mode == "fsdp":
    # As accelerate shards a model: its blocks, then the rest.
    mesh = init_device_mesh("cpu", (2,))
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
videos = SyntheticVideos(2, 3, (64, 64), seed=0)
processor = AutoProcessor.from_pretrained(folder)
clips = ClipDataset(videos, processor, num_frames=3)
assert {len(clips[i]["labels"]) for i in range(2)} == {1, 3}  # else the number of objects would not matter
chosen = [clips[rank]] if world > 1 else [clips[0], clips[1]]
batch = ClipCollator()(chosen)
model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss.backward()
gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
if mode == "fsdp":
    gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
masks = segment_video(getattr(model, "module", model).eval(), processor, videos[0])[0]
if rank == 0:
    torch.save({**gradients, "masks": torch.from_numpy(masks)}, output)
if world > 1:
    dist.destroy_process_group()
