"""A real engine: siblings, adapters, stop strings, a request that is refused, and a death that it gets over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pulse_ray.config import EngineConfig, SamplingConfig
from pulse_ray.errors import ArtifactError, GenerationError
from pulse_ray.generation import gates
from pulse_ray.generation.engine import Completion, Engine, EngineDeathError, RequestError

SAMPLING = SamplingConfig(max_tokens=12, gates=())
PROMPT = "They bought tea, and then they bought a cup. " * 8


def _adapter(model: Path, folder: Path, rank: int) -> Path:
    settings = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_engine_writes_refuses_dies_and_writes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    model = tiny.make(tmp_path / "model")
    adapter = _adapter(model, tmp_path / "adapter", 4)
    engine = Engine(
        EngineConfig(
            model=str(model), dtype="float32", max_model_len=512, kv_cache_gb=0.25, adapters={"other": str(adapter)}
        )
    )

    async def write(n: int, seed: int, sampling: SamplingConfig = SAMPLING) -> list[Completion]:
        return await engine.complete(PROMPT, n, seed, sampling)

    async def live() -> None:
        siblings = await write(3, 5)
        assert [one.seed for one in siblings] == [5, 6, 7]
        assert len({one.text for one in siblings}) == 3
        assert [one.text for (one,) in [await write(1, seed) for seed in (5, 6, 7)]] == [one.text for one in siblings]
        assert {one.finish_reason for one in siblings} == {"length"}
        assert 0 < engine.usage.cached_tokens < engine.usage.prompt_tokens

        greedy = await write(2, 5, SAMPLING.model_copy(update={"temperature": 0.0}))
        assert greedy[0].text == greedy[1].text
        assert (await write(1, 5, SAMPLING.model_copy(update={"adapter": "other"})))[0].text != siblings[0].text
        end = siblings[0].text[4:8]
        (stopped,) = await write(1, 5, SAMPLING.model_copy(update={"stop": (end,)}))
        assert (stopped.text, stopped.finish_reason) == (siblings[0].text.partition(end)[0], "stop")

        with pytest.raises(RequestError, match="maximum"):
            await engine.complete(PROMPT * 20, 1, 5, SAMPLING)
        request = gates.Request(prompt=PROMPT * 20, task="")
        engine.fits = lambda prompt, sampling: True  # type: ignore[method-assign]
        (refused,) = await gates.draw(engine, request, SAMPLING, lambda attempt: 5)
        assert isinstance(refused, gates.Flaw)
        assert refused.reason == "request failed"

        long = SAMPLING.model_copy(update={"max_tokens": 300})
        writing = [asyncio.ensure_future(write(2, seed, long)) for seed in range(4)]
        await asyncio.sleep(0.2)
        for child in psutil.Process().children(recursive=True):
            if "EngineCore" in child.name():
                child.kill()
        ends = await asyncio.gather(*writing, return_exceptions=True)
        assert {type(end) for end in ends} == {EngineDeathError}
        assert [one.text for one in await write(3, 5)] == [one.text for one in siblings]

    try:
        asyncio.run(live())
    finally:
        engine.close()


def test_an_adapter_that_no_engine_can_take_is_named(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    for described, complaint in (({"r": 1024}, "has rank 1024"), ({}, "has rank None")):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
        with pytest.raises(ArtifactError, match=complaint):
            Engine(EngineConfig(model=str(model), adapters={"big": str(tmp_path / "adapter")})).start()
    with pytest.raises(ArtifactError, match=r"holds no model: it has no adapter_config\.json"):
        Engine(EngineConfig(model=str(model), adapters={"none": str(model)})).start()


def test_model_without_a_readable_tokenizer_is_named(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    (model / "tokenizer_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"has no tokenizer that can be read.*Check the files in .*model"):
        _ = Engine(EngineConfig(model=str(model))).tokenizer


def test_engine_that_does_not_start_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("No available memory for the cache blocks\nand more")

    monkeypatch.setattr("pulse_ray.generation.engine._start_vllm", refuse)
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(GenerationError, match=r"No available memory for the cache blocks.*Check memory"):
        Engine(EngineConfig(model=str(tiny.make(tmp_path / "model")))).start()
    assert {child.pid for child in psutil.Process().children()} <= before


def test_request_that_vllm_aborts_is_an_error_and_no_completion(tmp_path: Path) -> None:
    class Aborting:
        """As much of vLLM as answers one request."""

        errored = False

        async def generate(self, *_: object, **__: object) -> AsyncIterator[SimpleNamespace]:
            yield SimpleNamespace(
                outputs=[SimpleNamespace(finish_reason="stop"), SimpleNamespace(finish_reason="abort")]
            )

    engine = Engine(EngineConfig(model=str(tiny.make(tmp_path / "model"))))
    engine._llm = Aborting()
    with pytest.raises(RequestError, match=r"broke off a request: {'abort'}"):
        asyncio.run(engine.complete(PROMPT, 2, 5, SAMPLING))
