"""Checkpoints of a PEFT training with the Hugging Face Trainer, or with LESS's scripts, as warm-ups of `less`.

The optimiser's moments are saved by number, in the order of Trainer's parameter groups (with weight decay, then
without; an adapter is never without), each group in the model's order; under FSDP, which LESS used, by name. They
are put back to the adapters' names and every shape is checked.

Source: transformers, Trainer.create_optimizer; princeton-nlp/LESS, collect_grad_reps.py (prepare_optimizer_state).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jz3.errors import Jz3Error
from jz3.features.less import AdamDirection
from jz3.features.lora import PARTS, Checkpoint, LoraShape, adapter_sizes, check_names
from jz3.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
}
"""What adapter_config.json has to say for jz3's adapters to be the same function; absent is as good."""
CHANGE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of adapters that take what they begin with out of the base model's weights."""
WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_orig_mod.")


def read_trainer_checkpoint(
    folder: Path,
    model: "PreTrainedModel",
    model_hash: str,
    *,
    learning_rate: float | None = None,
    direction: AdamDirection | None = None,
) -> Checkpoint:
    """Read adapters and Adam's moments from a checkpoint folder.

    Args:
        folder: with adapter_config.json, adapter_model.safetensors and optimizer.pt (or optimizer.bin).
        model: the base model that the adapters belong to, without them.
        model_hash: identifies it in the result.
        learning_rate: the checkpoint's weight; by default the mean of the learning rates that
            trainer_state.json logged over the epoch that ends here, as LESS weighs.
        direction: whose beta1 and beta2 must be those of the training; LESS's by default.

    Returns:
        The checkpoint, float32.

    Raises:
        Jz3Error: a file is missing or unreadable, the adapters are of a kind that jz3 doesn't compute, the
            optimiser is no Adam or has other betas, its state can't be mapped to the adapters' names, a name
            or shape is not this model's, or no learning rate is known.
    """
    config = _json(folder / "adapter_config.json")
    for key, plain in PLAIN.items():
        if config.get(key) and config[key] != plain:
            raise Jz3Error(f"{folder}: adapters with {key} = {config[key]!r} are not covered, only {plain!r}")
    start = str(config.get("init_lora_weights", ""))
    if start.lower().startswith(CHANGE_BASE):
        raise Jz3Error(
            f"{folder}: adapters with init_lora_weights = {start!r} are not covered: they belong to a base model that "
            "their start has changed and the checkpoint doesn't hold; train with PEFT's default"
        )
    weights = _weights(folder / "adapter_model.safetensors")
    rank = int(config["r"])
    shape = LoraShape(
        rank=rank,
        # Rank-stabilised adapters are scaled by alpha / sqrt(r).
        alpha=float(config["lora_alpha"]) * (rank**0.5 if config.get("use_rslora") else 1),
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=tuple(sorted({name.split(".")[-2] for name in weights})),
    )
    sizes = adapter_sizes(model, shape)
    check_names(f"{folder}: weight", weights, sizes)
    state, groups = _optimizer(folder)
    named = _by_name(folder, state, groups, list(sizes))
    direction = direction or AdamDirection()
    betas = {tuple(g["betas"]) for g in groups if "betas" in g}
    if betas - {(direction.beta1, direction.beta2)}:
        raise Jz3Error(
            f"{folder} was trained with Adam's betas {sorted(betas)}, the direction has {direction.beta1} and "
            f"{direction.beta2}; give it those of the training"
        )
    parts: dict[str, dict[str, torch.Tensor]] = {"weight": weights}
    for part in PARTS[1:]:
        parts[part] = {n: _moment(folder, n, entry, part) for n, entry in named.items()}
        check_names(f"{folder}: {part}", parts[part], sizes)
    steps = {int(_moment(folder, n, entry, "step")) for n, entry in named.items()}
    if len(steps) != 1:
        raise Jz3Error(f"{folder}: the adapters have taken different numbers of steps: {sorted(steps)}")
    rate = _learning_rate(folder) if learning_rate is None else learning_rate
    return Checkpoint(model_hash, shape, steps.pop(), rate, parts)


def _json(path: Path) -> Any:
    if not path.is_file():
        raise Jz3Error(f"{path} is missing; name a checkpoint folder of a PEFT training")
    return read_json(path)


def _weights(path: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Jz3Error(f"{path} can't be read ({error}); save the adapters as safetensors") from error
    return {_adapter(name): tensor.float() for name, tensor in tensors.items()}


def _adapter(name: str) -> str:
    """Turn `base_model.model.<layer>.lora_A.default.weight` into `<layer>.lora_A`."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    layer, mark, rest = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{layer}{mark}{rest.removesuffix('.weight').removesuffix('.default')}"


def _optimizer(folder: Path) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    import pickle

    import torch

    path = next((folder / name for name in OPTIMIZERS if (folder / name).is_file()), None)
    if path is None:
        raise Jz3Error(f"{folder} holds no {' or '.join(OPTIMIZERS)}; train with save_only_model=False")
    try:
        # Tensors, numbers and containers only: no code of the file is run.
        found = torch.load(path, map_location="cpu", weights_only=True)
        return dict(found["state"]), list(found.get("param_groups", []))
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Jz3Error(f"{path} is no state of a torch optimiser ({first})") from error


def _by_name(
    folder: Path, state: dict[Any, Any], groups: list[dict[str, Any]], names: list[str]
) -> dict[str, dict[str, Any]]:
    """Give the state's entries the adapters' names."""
    if state and all(isinstance(key, str) for key in state):
        return {_adapter(key): entry for key, entry in state.items()}
    filled = [g for g in groups if g["params"]]
    order = [i for g in filled for i in g["params"]]
    if all(len(g.get("param_names", ())) == len(g["params"]) for g in filled):
        known = [_adapter(n) for g in filled for n in g["param_names"]]
    elif len(filled) == 1 and len(order) == len(names):
        known = names
    else:
        raise Jz3Error(
            f"{folder}: the optimiser has {len(order)} weights in {len(filled)} groups without names, the adapters "
            f"are {len(names)}, which Trainer puts into one group; train the adapters alone"
        )
    if missing := [name for name, i in zip(known, order, strict=True) if i not in state]:
        raise Jz3Error(f"{folder}: the optimiser has no state of {missing[0]} and {len(missing) - 1} others")
    return {name: state[i] for name, i in zip(known, order, strict=True)}


def _moment(folder: Path, name: str, entry: dict[str, Any], part: str) -> "torch.Tensor":
    import torch

    if part not in entry:
        raise Jz3Error(
            f"{folder}: the state of {name} holds {sorted(entry)}, no {part}: the optimiser is no Adam"
        )
    return torch.as_tensor(entry[part]).float()


def _learning_rate(folder: Path) -> float:
    table = _json(folder / "trainer_state.json")
    end = float(table.get("epoch") or 0.0)
    rates = [
        float(row["learning_rate"])
        for row in table.get("log_history", [])
        if "learning_rate" in row and end - 1 < float(row.get("epoch", 0.0)) <= end
    ]
    mean = sum(rates) / max(1, len(rates))
    if mean <= 0:
        raise Jz3Error(
            f"{folder}/trainer_state.json logs no learning rate of its last epoch; say what it was"
        )
    return mean


def adopt_checkpoints(
    folders: "list[Path] | tuple[Path, ...]",
    model: "PreTrainedModel",
    model_hash: str,
    out: Path,
    *,
    learning_rates: "tuple[float, ...]" = (),
    direction: AdamDirection | None = None,
) -> tuple[Path, ...]:
    """Write the checkpoints of a training as those of a warm-up, `adopted-1.safetensors` and so on.

    Args:
        folders: of the training, see `read_trainer_checkpoint`.
        model: the base model.
        model_hash: identifies it.
        out: folder of the result.
        learning_rates: one per checkpoint, or none to take those that were logged.
        direction: see `read_trainer_checkpoint`.

    Returns:
        The files, in the folders' order.

    Raises:
        ValueError: there are not as many learning rates as folders.
        Jz3Error: as `read_trainer_checkpoint`.
    """
    rates: list[float | None] = [*learning_rates] or [None] * len(folders)
    if len(rates) != len(folders):
        raise ValueError(f"there are {len(folders)} checkpoints and {len(rates)} learning rates")
    paths = []
    for number, (folder, rate) in enumerate(zip(folders, rates, strict=True), 1):
        found = read_trainer_checkpoint(
            Path(folder), model, model_hash, learning_rate=rate, direction=direction
        )
        paths.append(out / f"adopted-{number}.safetensors")
        found.save(paths[-1])
    return tuple(paths)
