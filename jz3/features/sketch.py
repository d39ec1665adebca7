"""`sketch` features: two-sided sign projections of every layer, hashed into one K-vector.

Needs no sample of anything. Per layer P = L^T G R with L [O, p_o] and R [I, p_i] of random signs
(divided by sqrt(p_o p_i)), and every entry of P is added with a hashed sign into one of K buckets,
so that E<phi_i, phi_q> = <G_i, G_q>. Tall shapes (p_o much larger than p_i) are better at equal K: the
inputs are dominated by their mean, the information is on the output side.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.files import hash_file, read_json, write_json
from jz3.gradients import layer_shape

if TYPE_CHECKING:
    import torch

FORMAT = "jz3-sketch-1"


@dataclass(frozen=True, slots=True)
class Sketch:
    """The seeds and shapes of a sketch; the random signs themselves are never stored."""

    model_hash: str
    shapes: dict[str, tuple[int, int]]
    """Per layer (O, I)."""
    k: int
    left: int
    right: int
    seed: int

    @classmethod
    def of(
        cls, model_hash: str, layers: dict[str, "torch.nn.Module"], k: int, left: int, right: int, seed: int
    ) -> "Sketch":
        """Make the sketch of a model's layers."""
        return cls(model_hash, {n: layer_shape(m) for n, m in layers.items()}, k, left, right, seed)

    @property
    def mean(self) -> "torch.Tensor":
        """[K] zeros: hashed coordinates are centred by construction."""
        import torch

        return torch.zeros(self.k, dtype=torch.float32)

    @property
    def scale(self) -> "torch.Tensor":
        """[K] 1/sqrt(K): the root mean square of a unit vector's coordinates."""
        import torch

        return torch.full((self.k,), self.k**-0.5, dtype=torch.float32)

    def save(self, path: Path) -> str:
        """Write the sketch's description as JSON and return the file's hash."""
        fields = {f: getattr(self, f) for f in ("model_hash", "k", "left", "right", "seed")}
        write_json(path, {"format": FORMAT, "shapes": self.shapes, **fields})
        return hash_file(path)

    @classmethod
    def load(cls, path: Path, model_hash: str) -> "Sketch":
        """Read a sketch and refuse one of another model."""
        table = read_json(path)
        if table.pop("format", None) != FORMAT:
            raise Jz3Error(f"{path} is no sketch of the format {FORMAT!r}")
        if table["model_hash"] != model_hash:
            raise Jz3Error(f"{path} was made for model {table['model_hash']}, this model is {model_hash}")
        table["shapes"] = {n: tuple(s) for n, s in table["shapes"].items()}
        return cls(**table)

    def __str__(self) -> str:
        return json.dumps({"k": self.k, "left": self.left, "right": self.right, "seed": self.seed})


class SketchSink:
    """Sketches each text's gradient and estimates its norm by the projections' own."""

    def __init__(self, sketch: Sketch, dtype: "torch.dtype", device: "torch.device") -> None:
        from jz3.ops.signs import signs

        self._sketch = sketch
        self._left: dict[str, Any] = {}
        self._right: dict[str, Any] = {}
        for name, (outputs, inputs) in sketch.shapes.items():
            for side, size, width in (("left", outputs, sketch.left), ("right", inputs, sketch.right)):
                matrix = signs(sketch.seed, f"{name}.{side}", width, size).T.float()
                getattr(self, f"_{side}")[name] = (matrix / width**0.5).to(device, dtype)
        self._values: Any = None
        self._square: Any = None

    def begin(self) -> None:
        """Forget what a pass that broke off may have left."""
        self._values = self._square = None

    def forward(self, name: str, a: "torch.Tensor") -> Any:
        """Keep a R; a itself is dropped."""
        # Adapters and routers may have a number format of their own.
        return a @ self._right[name].to(a.dtype)

    def backward(self, name: str, kept: Any, g: "torch.Tensor") -> None:
        """Add ||G||^2 and the layer's hashed projection."""
        import torch

        from jz3.ops.segment_project import segment_project
        from jz3.ops.sketch import sketch

        count, width, _ = g.shape
        if self._square is None:
            self._square = torch.zeros(count, device=g.device, dtype=torch.float32)
            self._values = torch.zeros(count, self._sketch.k, device=g.device, dtype=torch.float32)
        bounds = torch.arange(0, count * width + 1, width)
        left = self._left[name].to(g.dtype)
        block = segment_project(kept.flatten(0, 1), g.flatten(0, 1), left, bounds).flatten(1).float()
        self._square += block.square().sum(1)
        sketch(block, name, self._sketch.k, seed=self._sketch.seed, out=self._values)

    def take(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return (unit-norm values [B, K], norms [B]) of the batch just run and forget it."""
        norm = self._square.clamp(min=0).sqrt()
        values = self._values / norm[:, None]
        self._values = self._square = None
        return values.cpu(), norm.cpu()
