"""The page's controls, with Gradio."""

from collections.abc import Callable, Iterator
from typing import Any

from jz3.errors import Jz3Error
from jz3.explore import render
from jz3.explore.view import Answer, View

PAGE = 5
"""Texts a page."""
EXAMPLE = 70
"""Characters of an example that its button shows."""


def build_page(view: View) -> Any:
    """Return the Gradio page of a run."""
    import gradio as gr

    with gr.Blocks(title=f"jz3 explore: {view.collection.name}", analytics_enabled=False) as page:
        gr.HTML(view.header())
        with gr.Tab("Look up", id="look-up"):
            if view.missing_features:
                gr.HTML(render.message(f"No problem can be looked up: {view.missing_features}."))
            else:
                _look_up(gr, view)
        with gr.Tab("Best and worst texts", id="texts"):
            if view.scores is None:
                gr.HTML(render.message("No scores in this run yet: run `jz3 influence` and start again."))
            else:
                _texts(gr, view)
        with gr.Tab("Scores and sources", id="scores"):
            pictures = gr.HTML()
        if view.scores is not None:
            page.load(view.pictures, outputs=pictures, show_progress="hidden")
    return page


def _look_up(gr: Any, view: View) -> None:
    answer = gr.State(None)
    start = gr.State(0)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            problem = gr.Textbox(label="Problem", lines=5, elem_id="problem", placeholder="Type a problem")
            solution = gr.Textbox(
                label="Solution (optional; then only it is scored)", lines=3, elem_id="solution"
            )
            explain = gr.Checkbox(label="Show which tokens help (a model pass per text)", value=True)
            ask = gr.Button("Find the texts that help", variant="primary", elem_id="ask")
            if examples := view.examples():
                gr.Examples(
                    examples,
                    [problem, solution],
                    label="Problems of this run's targets",
                    example_labels=[" ".join(row[0].split())[:EXAMPLE] + " ..." for row in examples],
                )
        with gr.Column(scale=5, min_width=420):
            results = gr.HTML(render.message("Type a problem to see which texts of the corpus help with it."))
            previous, label, following = _pager(gr, "found")

    def show(found: Answer | None, place: int, explained: bool) -> Iterator[tuple[Any, ...]]:
        if found is None:
            yield gr.skip(), 0, "", gr.skip(), gr.skip()
            return
        place = min(max(place, 0), max(len(found.matches) - 1, 0) // PAGE * PAGE)
        state = _place(gr, place, len(found.matches))
        yield view.found(found, place, PAGE, False), place, *state
        if explained:
            yield view.found(found, place, PAGE, True), place, *state

    def look_up(text: str, worked: str, explained: bool) -> Iterator[tuple[Any, ...]]:
        try:
            found = view.ask(text, worked)
        except (ValueError, Jz3Error) as error:
            yield None, render.message(str(error), "error"), 0, "", gr.skip(), gr.skip()
            return
        for shown in show(found, 0, explained):
            yield found, *shown

    outputs = [results, start, label, previous, following]
    gr.on(
        [ask.click, problem.submit],
        look_up,
        [problem, solution, explain],
        [answer, *outputs],
        concurrency_limit=1,
    )
    _turn(previous, following, show, [answer, start, explain], outputs)


def _texts(gr: Any, view: View) -> None:
    start = gr.State(0)
    tasks = view.table().tasks
    with gr.Row():
        task = gr.Dropdown(tasks, value=tasks[0], label="Target", elem_id="task")
        side = gr.Radio(["best", "worst"], value="best", label="Texts", elem_id="side")
    cards = gr.HTML()
    previous, label, following = _pager(gr, "texts")

    def show(name: str, which: str, place: int) -> Iterator[tuple[Any, ...]]:
        total = len(view.table())
        place = min(max(place, 0), max(total - 1, 0) // PAGE * PAGE)
        yield view.ranked(name, which == "worst", place, PAGE), place, *_place(gr, place, total)

    def first(name: str, which: str) -> Iterator[tuple[Any, ...]]:
        yield from show(name, which, 0)

    outputs = [cards, start, label, previous, following]
    gr.on([gr.context.Context.root_block.load, task.change, side.change], first, [task, side], outputs)
    _turn(previous, following, show, [task, side, start], outputs, place=2)


def _pager(gr: Any, name: str) -> tuple[Any, Any, Any]:
    with gr.Row(elem_id=f"{name}-pager", elem_classes="jz3-pager"):
        previous = gr.Button("Previous", size="sm", interactive=False, elem_id=f"{name}-previous")
        label = gr.Markdown("", elem_id=f"{name}-place")
        following = gr.Button("Next", size="sm", interactive=False, elem_id=f"{name}-next")
    return previous, label, following


def _place(gr: Any, place: int, total: int) -> tuple[str, Any, Any]:
    """Return the pager's label and its two buttons' states."""
    text = f"{place + 1} to {min(place + PAGE, total)} of {total:,}" if total else "nothing"
    return text, gr.update(interactive=place > 0), gr.update(interactive=place + PAGE < total)


def _turn(
    previous: Any,
    following: Any,
    show: Callable[..., Iterator[tuple[Any, ...]]],
    inputs: list[Any],
    outputs: list[Any],
    place: int = 1,
) -> None:
    """Make the buttons call `show` with the place (input number `place`) one page on or back."""

    def turned(step: int) -> Callable[..., Iterator[tuple[Any, ...]]]:
        def turn(*values: Any) -> Iterator[tuple[Any, ...]]:
            arguments = list(values)
            arguments[place] += step
            yield from show(*arguments)

        return turn

    previous.click(turned(-PAGE), inputs, outputs, concurrency_limit=1)
    following.click(turned(PAGE), inputs, outputs, concurrency_limit=1)
