"""Sharded tensors in parts and as wholes, on every mesh that a trainer uses."""

import pytest
import torch
import torch.distributed as dist
from groups import run_in_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from plumb.distributed import collectives, sharding

# even, uneven, and with nothing left for some ranks
SHAPES = [
    (8, 8),
    (7, 8),
    (5, 6),
    (1, 4),
    (3, 4),
    (9, 12),
    (12, 5),
]


def tile(sizes):
    """FSDP (shard), HSDP (replicate, shard), TP (tp), and both, over all shapes and cuts."""
    mesh = dist.init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for rows, columns in SHAPES:
        expected = torch.arange(rows * columns).float().view(rows, columns)
        for cut in ([Shard(0)], [Shard(1)], [Replicate()]) if "tp" in sizes else [None]:
            if cut == [Shard(1)] and columns % sizes["tp"]:
                continue  # tensor parallelism is refused where it does not divide
            module = nn.Linear(columns, rows, bias=False)
            module.weight.data.copy_(expected)
            if cut:
                module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh["tp"], cut))
            if "shard" in sizes:
                fully_shard(module, mesh=mesh[tuple(x for x in sizes if x != "tp")])
            check(module, expected)


def check(module, expected):
    parts = [
        part
        for part in collectives.all_gather_object(sharding.local_part(module.weight))
        if part is not None
    ]
    times, put_together = torch.zeros_like(expected), torch.full_like(expected, torch.nan)
    for start, values in parts:
        where = tuple(slice(a, a + n) for a, n in zip(start, values.shape, strict=True))
        times[where] += 1
        put_together[where] = values
    assert (times == 1).all() and torch.equal(put_together, expected), (
        module.weight.placements,
        times,
    )
    assert torch.equal(sharding.full_tensor(module.weight), expected)
    ((name, full),) = sharding.gathered(module.state_dict(keep_vars=True).items())
    assert name == "weight" and (
        torch.equal(full, expected) if dist.get_rank() == 0 else full is None
    )
    plain = collectives.all_gather_object(sharding.local_part(expected))
    assert plain[0][0] == (0, 0) and torch.equal(plain[0][1], expected) and not any(plain[1:])


def tile_all(meshes):
    for sizes in meshes:
        tile(sizes)


@pytest.mark.parametrize(
    "n, meshes",
    [
        (2, [{"shard": 2}, {"tp": 2}]),
        (3, [{"shard": 3}, {"tp": 3}]),
        (
            4,
            [
                {"shard": 4},
                {"replicate": 2, "shard": 2},
                {"shard": 2, "tp": 2},
                {"shard": 1, "tp": 4},
            ],
        ),
        (6, [{"shard": 3, "tp": 2}, {"shard": 2, "tp": 3}]),
        (8, [{"replicate": 2, "shard": 2, "tp": 2}]),
    ],
)
def test_the_parts_of_all_ranks_tile_the_whole(n, meshes):
    run_in_group(n, tile_all, meshes)
