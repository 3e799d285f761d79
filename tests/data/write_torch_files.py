"""Writes tests/data/torch: files of torch.save that the tests read without torch.

Run by hand, where torch is installed (2.13.0 wrote the files that are kept):
python tests/data/write_torch_files.py. The tests know the values, which are multiples of 1/8.
"""

import pathlib

import torch

FOLDER = pathlib.Path(__file__).parent / "torch"


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """0, 1/8, 2/8, ... (0, 1, 2, ... for integers)."""
    values = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return (values / 8 if dtype.is_floating_point else values).to(dtype)


def every_kind() -> dict[str, torch.Tensor]:
    """Each dtype that is read, and each way in which a tensor can lie in its storage."""
    dtypes = (
        (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    )  # fmt: skip
    state = {str(dtype).removeprefix("torch."): ramp(2, 3, dtype=dtype) for dtype in dtypes}
    shared = ramp(4, 6)
    return state | {
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(0.5),
        "empty": torch.empty(0, 3),
        "shared": shared,
        "transposed": shared.T,
        "part": shared[1:3, 1::2],
        "column": shared[:, 2:3],
        "expanded": ramp(3)[:, None].expand(3, 2),
        "parameter": torch.nn.Parameter(ramp(3)),
    }


def checkpoint() -> dict[str, object]:
    """What a training script saves: a module's state dict, an optimizer's, numbers and text."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(ramp(4, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(ramp(*value.shape, dtype=value.dtype))
    state = torch.nn.DataParallel(model).state_dict()
    return {
        "epoch": 3,
        "best": 0.5,
        "args": {"name": "tiny", "sizes": [3, (2, None)], "shape": torch.Size([2, 3])},
        "optimizer": optimizer.state_dict(),
        "model": state,
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    torch.save(every_kind(), FOLDER / "every_kind.pth")
    torch.save(checkpoint(), FOLDER / "checkpoint.pt")
    torch.save({"w": ramp(2)}, FOLDER / "legacy.pth", _use_new_zipfile_serialization=False)
