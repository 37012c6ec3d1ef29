"""GPUs by name: what NVIDIA's data sheets promise, and the memory that PyTorch finds.

Peaks are bf16 without sparsity: half of what a data sheet gives with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: of the variable GPU and ``--gpu``.
        title: how people write it.
        peak_tflops: bf16 without sparsity.
        memory_gib: as PyTorch reports it; a data sheet's GB are decimal, and ECC and the driver
            take their part.
        nvlink: GB/s in one direction, half of what the data sheet calls the bandwidth.
        network: GB/s of a node's cards for each GPU, as systems are built with it.
        capability: its compute capability.
        per_node: how many of them a node has, at most sites.
    """

    name: str
    title: str
    peak_tflops: float
    memory_gib: float
    nvlink: float
    network: float
    capability: tuple[int, int]
    per_node: int = 8


# Peak and NVLink: the data sheets of the A100 80GB SXM, the H100 SXM, the H200 SXM, the GH200
# (96 GB), the HGX B200 and the GB200 NVL72 (of two GPUs: 10 PFLOPS with sparsity).
# Network: one card of 400 Gb/s a GPU in the DGX H100, H200 and B200 and the GB200 NVL72, of 200
# Gb/s in the DGX A100 and, with GH200, in Alps (Slingshot 11).
# Nodes: eight in a DGX or HGX, four in a node of Alps and a compute tray of the GB200 NVL72.
# Memory: what PyTorch's out-of-memory errors call the total capacity of these, in public issues and
# logs. Of the 80 GB ones it is 79.1 to 79.3, of the H200 139.7 to 139.8; of the GH200 94.88 in
# Lightning-AI/litgpt #1892, of the B200 178.35 in pytorch/ao #4002.
BY_NAME = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", "A100", 312, 79.1, 300, 25, (8, 0)),
        Gpu("h100", "H100", 989, 79.1, 450, 50, (9, 0)),
        Gpu("h200", "H200", 989, 139.7, 450, 50, (9, 0)),
        Gpu("gh200", "GH200", 989, 94.5, 450, 25, (9, 0), per_node=4),
        Gpu("b200", "B200", 2250, 178.3, 900, 50, (10, 0)),
        Gpu("gb200", "GB200", 2500, 184.3, 900, 50, (10, 0), per_node=4),
    )
}
H100 = BY_NAME["h100"]
