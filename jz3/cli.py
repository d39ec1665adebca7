"""`jz3`: the whole loop, each of its stages, look-ups and the state of the machine."""

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from jz3.errors import Jz3Error
from jz3.printable import printable

STAGE_COMMANDS = {
    "corpus": ("corpus", "Read, cut and deduplicate the corpus."),
    "features": ("features", "Compute the gradient features of corpus and targets."),
    "influence": ("influence", "Score every text for every target, with baselines and fidelity."),
    "select": ("selection", "Choose the texts worth most."),
    "compare": ("comparison", "Train on each chooser's texts and tell which choice pays."),
    "teach": ("distillation", "Have the teacher write problems about random and about chosen texts."),
    "synthesize": ("synthesis", "Train the synthesiser and have it write problems."),
    "filter": ("filtering", "Verify, execute, deduplicate and decontaminate the problems."),
    "train": ("training", "Train the base model on the kept problems."),
    "evaluate": ("evaluation", "Compare the base model with the trained one."),
    "report": ("report", "Write report.html and results.json."),
}
"""Command to (stage, help): each runs what is missing up to its stage."""


def _set_environment() -> None:
    """Set what libraries read when they are loaded, unless the user has."""
    # Their own bars and notices would hide ours.
    defaults = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's threads wait for their next product in a loop, by default for so long that jz3's own, which compute
        # in turn with them, have to share the cores with it.
        defaults["GOMP_SPINCOUNT"] = "20000"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done; 2: a user's error, told in one line; 130: interrupted; 141: nobody reads the output
    any more. `--debug` anywhere shows tracebacks.
    """
    _set_environment()
    import tyro
    from tyro.conf import Positional, arg

    from jz3.index.config import IndexConfig

    INDEX = IndexConfig()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")

    def quickstart(
        out: Path = Path("runs/quickstart"),
        preset: str = "quickstart",
        model: str = "",
        dry_run: bool = False,
    ) -> None:
        """Run the whole loop on this machine: embedded model and corpus, no hub, no GPU, no key.

        Args:
            out: the run's folder; running again goes on where it stopped.
            preset: `quickstart`, or `tiny`: a random two-layer model, in under a minute.
            model: another model (folder or hub name) instead of the embedded one.
            dry_run: print the stages with counts and costs and run nothing.
        """
        from jz3.config import shipped_recipe

        if preset not in ("quickstart", "tiny"):
            raise ValueError(f"--preset must be quickstart or tiny, got {preset!r}")
        recipe = shipped_recipe(preset)
        if model:
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name=model))
        _run(recipe, out, "report", dry_run)

    def run(
        recipe: Annotated[Positional[Path], arg(help="a TOML file, or the name of a shipped recipe")],
        out: Path | None = None,
        until: str = "report",
        dry_run: bool = False,
    ) -> None:
        """Run the whole loop from a recipe, resumable.

        Args:
            out: the run's folder, `runs/NAME` by default.
            until: the last stage to run.
            dry_run: print the stages with counts, tokens, calls, GPU hours and money, and run nothing.
        """
        loaded = _recipe(recipe)
        _run(loaded, out or Path("runs") / loaded.name, until, dry_run)

    def query(
        run: Positional[Path],
        text: str | None = None,
        file: Path | None = None,
        solution: str = "",
        k: int = 5,
        exact: bool = False,
        checkpoint: int | None = None,
    ) -> None:
        """Print the texts of a run's corpus that help most with a problem.

        Without --text and --file it asks for problems until the input ends.

        Args:
            run: the folder of a run of the loop, or of `jz3 score --keep-features`, whose index is built.
            text: the problem.
            file: many problems: JSON lines (plain, `.gz` or `.zst`) with `problem` and perhaps `solution`;
                answers are JSON lines.
            solution: the solution of --text, if known: then only its tokens are scored.
            k: how many texts.
            exact: scan all codes instead of asking the index.
            checkpoint: of a scored run with several, the only one whose features are searched; by default all
                are, by their weights.
        """
        from jz3.index.opening import open_collection
        from jz3.index.query import command

        _quiet_libraries()
        command(open_collection(run, checkpoint), text, file, solution, k, exact)

    def index(
        run: Positional[Path],
        recipe: Path | None = None,
        checkpoint: int | None = None,
        settings: Annotated[IndexConfig, arg(name="")] = INDEX,
    ) -> None:
        """Build the FAISS index over a run's features, or bring it up to date.

        Of a run of the loop it runs what is missing up to this stage, with the settings of the recipe.

        Args:
            run: the folder of a run of the loop, or of `jz3 score --keep-features`.
            recipe: a TOML file or a shipped recipe's name; by default the one the run was made with.
            checkpoint: of a scored run with several, the only one whose features are indexed.
            settings: of a scored run's index.
        """
        from jz3.index.opening import open_collection
        from jz3.index.stage import index_scored

        if (run / "plan.json").is_file():
            if recipe is not None:
                raise ValueError(f"--recipe: {run} is a run of `jz3 score`, which has none")
            _quiet_libraries()
            index_scored(open_collection(run, checkpoint), settings)
            return
        if settings != INDEX:
            raise ValueError(
                f"{run} is no run of `jz3 score`: the settings are in the recipe's section [index]"
            )
        if checkpoint:
            raise ValueError(f"--checkpoint {checkpoint}: {run} is a run of the loop, which has one model")
        _run(_stored_or(run, recipe), run, "index", False)

    def store(
        action: Positional[str], folders: Positional[tuple[Path, ...]], out: Path | None = None
    ) -> None:
        """Describe, check or merge feature stores.

        Args:
            action: `info`, `verify` (reads every byte) or `merge`.
            folders: of stores, or of runs with one.
            out: merge: the new store's folder.
        """
        from jz3.store.tools import command

        command(action, folders, out)

    def explore(
        run: Positional[Path], port: int = 7860, host: str = "127.0.0.1", checkpoint: int | None = None
    ) -> None:
        """Serve a local page: type a problem, see the texts that help it; scores, sources, best and worst.

        Args:
            run: the folder of a run of the loop or of `jz3 score`; problems are looked up where features
                were kept, faster once `jz3 index` has run.
            port: of the page.
            host: the address to listen on; anything but this machine's own is open to the network.
            checkpoint: of a scored run with several, the only one whose features are searched; by default all
                are, by their weights.
        """
        from jz3.explore import serve

        _quiet_libraries()
        serve(run, host, port, checkpoint)

    def doctor() -> None:
        """Report the machine, the back ends and what is missing, with the remedy."""
        from jz3 import doctor as checks

        for check in checks.report():
            print(f"{check.status:8} {check.name:18} {check.found}")
            if check.remedy:
                print(f"{'':27} {check.remedy}")

    from jz3.explain_command import explain
    from jz3.fit_command import fit
    from jz3.scoring.command import score

    commands: dict[str, Callable[..., Any]] = {
        "quickstart": quickstart,
        "run": run,
        "index": index,
        "query": query,
        "store": store,
        "explore": explore,
        "doctor": doctor,
        "fit": fit,
        "explain": explain,
        "score": score,
    }
    for name, (stage, text) in STAGE_COMMANDS.items():
        commands[name] = _stage_command(stage, text, Positional)
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="jz3", description=__doc__, args=arguments)
        sys.stdout.flush()
    except (Jz3Error, ValueError) as error:
        if debug:
            traceback.print_exc()
        print(f"jz3: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`); what is left would fail at exit once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug:
            traceback.print_exc()
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"jz3: error: {printable(' '.join(text.split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jz3: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _stage_command(stage: str, text: str, positional: Any) -> Callable[..., None]:
    def command(run: Path, recipe: Path | None = None) -> None:
        _run(_stored_or(run, recipe), run, stage, False)

    command.__annotations__ = {"run": positional[Path], "recipe": Path | None, "return": None}
    command.__doc__ = (
        f"{text}\n\nRuns what is missing up to this stage.\n\nArgs:\n"
        "    run: the run's folder.\n"
        "    recipe: a TOML file or a shipped recipe's name; by default the one the run was made with."
    )
    return command


def _stored_or(run: Path, recipe: Path | None) -> Any:
    from jz3.config import stored_recipe

    return stored_recipe(run) if recipe is None else _recipe(recipe)


def _recipe(path: Path) -> Any:
    from jz3.config import load_recipe, shipped_recipe

    if path.suffix == "" and not path.is_file():  # a run's folder may have the name
        return shipped_recipe(str(path))
    return load_recipe(path)


def _run(recipe: Any, out: Path, last: str, dry_run: bool) -> None:
    if dry_run:
        from jz3.estimate import print_estimate

        print_estimate(recipe, last)
        return
    from jz3 import backend
    from jz3.pipeline import run_pipeline
    from jz3.report.terminal import print_results

    _quiet_libraries()
    logging.getLogger("jz3").info("back ends: %s", backend.report())
    run_pipeline(recipe, out, last, say=lambda line: print(line, file=sys.stderr, flush=True))
    if last == "report":
        print_results(out)
    if last == "comparison":
        from jz3.comparison.table import text_table
        from jz3.files import read_json

        print(text_table(read_json(out / "comparison" / "manifest.json")["summary"]))


def _quiet_libraries() -> None:
    """Turn off other libraries' progress bars and chatter; their warnings stay."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
