"""What the rows of a store are: the manifest, the codes, the layout of a shard's file."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from jz3 import __version__
from jz3.errors import Jz3Error
from jz3.files import canonical_json, hash_text, read_json
from jz3.store.digits import Digits, decode_digits, digits_of, encode_digits

if TYPE_CHECKING:
    import torch

FORMAT = "jz3-store-2"
CODES = {16: "bf16", 8: "int8", 4: "4bit", 2: "2bit", 1: "1bit"}
"""Bits per number and the name of the code; all but bf16 are codes of jz3.ops.encode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a store's rows are; two stores fit together if all of it is equal."""

    kind: str
    """Feature kind, e.g. `adapted`."""
    k: int
    """Numbers per document."""
    bits: int
    """Bits per number, of CODES."""
    model_hash: str
    projection_hash: str
    """Hash of the fit's or sketch's file."""
    reduction: str
    module_hash: str = ""
    """Hash of the table of layers, see `module_hash`; empty if it isn't recorded."""
    seed: int | None = None
    """Of the run that made the features; None if it isn't recorded."""
    products: str = "exact"
    """In what the documents' passes multiplied: one of PRODUCTS (jz3.machine) but `auto`."""

    def identity(self) -> str:
        """Return the 16 hexadecimal digits that every shard of such a store carries."""
        fields = asdict(self)
        # Stores that are older than the field are exact, and keep their name.
        if fields["products"] == "exact":
            del fields["products"]
        return hash_text(canonical_json(fields))


@dataclass(frozen=True, slots=True)
class Coding:
    """How numbers become codes: standardised by mean and scale, then `bits` each; bf16 is not standardised."""

    mean: "torch.Tensor"
    scale: "torch.Tensor"
    bits: int
    widths: "torch.Tensor | None" = None
    """[K] int64, every number's own bits, K times `bits` in all (jz3.store.digits); None if all have `bits`."""

    def __post_init__(self) -> None:
        if self.widths is not None and int(self.widths.sum()) != self.bits * len(self.mean):
            raise ValueError(
                f"widths must have {self.bits} x {len(self.mean)} bits in all, got {int(self.widths.sum())}"
            )

    def signs(self, device: "torch.device | str" = "cpu") -> Digits:
        """Return the layout of a row whose numbers have widths of their own."""
        assert self.widths is not None
        return digits_of(self.mean.to(device), self.scale.to(device), self.widths)

    def scanned(self, queries: "torch.Tensor") -> "tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]":
        """Return the code's name, mean and scale and the queries [Q, *] as `score_topk` takes them."""
        if self.widths is None:
            mean, scale = (x.to(queries.device) for x in (self.mean, self.scale))
            return check_bits(self.bits), mean, scale, queries
        if queries.ndim != 2 or queries.shape[1] != len(self.mean):
            raise ValueError(f"queries must be [Q, {len(self.mean)}], got {list(queries.shape)}")
        signs = self.signs(queries.device)
        return "1bit", signs.mean, signs.scale, queries[:, signs.number].contiguous()


def module_hash(shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return the hash of a table of layers.

    Args:
        shapes: per layer its (output features, input features).
    """
    return hash_text(canonical_json({name: list(shape) for name, shape in shapes.items()}))


def check_bits(bits: int) -> str:
    """Return the name of the code with `bits` bits.

    Raises:
        ValueError: there is none.
    """
    if bits not in CODES:
        raise ValueError(f"a store's bits must be one of {sorted(CODES)}, got {bits}")
    return CODES[bits]


def row_bytes(bits: int, k: int) -> int:
    """Return how many bytes the codes of a document take."""
    return -(-k * bits // 8)


def encode_rows(values: "torch.Tensor", coding: Coding) -> "torch.Tensor":
    """Turn features [N, K] float32 into codes [N, bytes] uint8."""
    import torch

    kind = check_bits(coding.bits)
    if coding.widths is not None:
        signs = coding.signs(values.device)
        return encode_digits(values, coding.mean.to(values.device), signs)
    if kind != "bf16":
        from jz3.ops.encode import encode

        return encode(values, coding.mean, coding.scale, kind)
    from jz3.ops.checks import all_finite

    if not all_finite(values):
        raise ValueError("features must be finite")
    return values.to(torch.bfloat16).contiguous().view(torch.uint8)


def decode_rows(codes: "torch.Tensor", coding: Coding) -> "torch.Tensor":
    """Turn codes [N, bytes] uint8 back into features [N, K] float32."""
    import torch

    kind = check_bits(coding.bits)
    if coding.widths is not None:
        return decode_digits(codes, coding.mean.to(codes.device), coding.signs(codes.device))
    if kind != "bf16":
        from jz3.ops.encode import decode

        return decode(codes, coding.mean, coding.scale, kind)
    return codes.contiguous().clone().view(torch.bfloat16).float()


def open_store(folder: Path | str, info: StoreInfo) -> None:
    """Create the store `folder`, or check that what is there holds the same kind of rows.

    Several processes may do so at once.

    Raises:
        ValueError: there are no codes of so many bits.
        Jz3Error: the folder holds a store of another kind; the differences are named.
    """
    check_bits(info.bits)
    folder = Path(folder)
    path = folder / "store.json"
    if not path.is_file():
        table = {"format": FORMAT, **asdict(info), "versions": _versions()}
        folder.mkdir(parents=True, exist_ok=True)
        # A name of its own, as several workers may create the store at the same moment.
        part = path.with_name(f"store.json.{os.getpid()}.part")
        part.write_text(canonical_json(table) + "\n", encoding="utf-8")
        os.replace(part, path)
    if different := differences(read_info(folder), info):
        raise Jz3Error(f"{folder} holds other features ({'; '.join(different)}); use another folder")


def differences(
    found: StoreInfo, wanted: StoreInfo, names: tuple[str, str] = ("in the store", "now")
) -> list[str]:
    """Name what tells a store's rows from the wanted ones."""
    one, other = asdict(found), asdict(wanted)
    return [
        f"{key}: {one[key]!r} {names[0]}, {other[key]!r} {names[1]}" for key in one if one[key] != other[key]
    ]


def read_manifest(folder: Path | str) -> dict:
    """Read store.json whole: the format, what the rows are, the versions of what made them."""
    path = Path(folder) / "store.json"
    if not path.is_file():
        raise Jz3Error(f"{folder} is no feature store (it has no store.json)")
    table = read_json(path)
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        raise Jz3Error(f"{path} has the format {found!r}, expected {FORMAT!r}; make the features again")
    return table


def read_info(folder: Path | str) -> StoreInfo:
    """Read what a store's rows are.

    Raises:
        Jz3Error: the folder holds no store, or one of another format.
    """
    table = {k: v for k, v in read_manifest(folder).items() if k not in ("format", "versions")}
    try:
        return StoreInfo(**table)
    except TypeError as error:
        raise Jz3Error(
            f"{Path(folder) / 'store.json'} is damaged ({error}); make the features again"
        ) from error


def _versions() -> dict[str, str]:
    # A clone on PYTHONPATH is no installed package.
    return {"jz3": __version__, **{name: version(name) for name in ("torch", "transformers")}}
