"""One of several processes that compute a contrastive loss together. Imports little: each of them imports it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pile_app.tasks.retrieval import Embeddings, contrastive_loss, gather

LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])
MODALITIES = torch.tensor([0, 1, 1, 2, 0, 0, 2, 0, 1])
SHARES = ((4, 5), (0, 9))  # segments of each of two processes


def loss_and_gradients(share: slice) -> list[torch.Tensor]:
    """Of a projection and a temperature, on some of the segments; the loss is that of all of them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(LABELS), 6, generator=generator)
    weight = torch.randn(6, 4, generator=generator).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    vectors = F.normalize(features[share] @ weight, dim=1)
    loss = contrastive_loss(gather(Embeddings(vectors, LABELS[share], MODALITIES[share])), scale)
    loss.backward()
    assert weight.grad is not None and scale.grad is not None
    return [loss.detach(), weight.grad, scale.grad]


def member(rank: int, port: int, folder: Path) -> None:
    """Saves what DDP would make of the gradients of two processes, by how they share the segments."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for shares in SHARES:
        first = sum(shares[:rank])
        found = loss_and_gradients(slice(first, first + shares[rank]))
        for tensor in found:
            dist.all_reduce(tensor)
            tensor /= 2
        if rank == 0:
            torch.save(found, folder / f"{shares}.pt")
    dist.destroy_process_group()
