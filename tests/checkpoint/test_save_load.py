"""What is written loads back bit for bit, in both layouts; what does not fit is refused; nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from model.checkpoint import describe, export_published, load, load_with_report, save
from model.checkpoint import saving as saving_module
from model.checkpoint.names import native_to_published, published_to_native
from model.checkpoint.published_config import NATIVE_SECTION
from model.errors import MedPLIBError
from model.inference.quantise import quantise
from model.modeling.medplib import MedPLIBForCausalLM
from tests.checkpoint.conftest import assert_same_weights

IDS = torch.tensor([[1, 20, 30, 40, 50]])
VARIANTS = [
    {},
    {"experts": 0},
    {"experts": 3, "projector": {"type": "linear"}},
    {"projector": {"type": "mlp3x_gelu"}, "region": {"enabled": False}},
    {"moe": {"layers": [1], "num_experts": [2], "top_k": 2, "use_residual": True}, "mask": {"adapter": False}},
    {"in_context": {"token_compressor": True, "mask_encoder": True, "compressed_tokens": 4, "mask_encoder_tokens": 4}},
]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for rounding, which on some processors depends on how the weights are aligned in memory."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_to_published_to_native_is_exact(make, tmp_path: Path, options: dict, dtype: torch.dtype) -> None:
    model, processor = make(**options)
    model = model.to(dtype)
    save(model, processor, tmp_path / "native")
    first, first_processor = load(tmp_path / "native")
    assert_same_weights(first, model)
    for fmt in ("safetensors", "bin"):
        export_published(first, first_processor, tmp_path / fmt, fmt=fmt)
        second, second_processor, report = load_with_report(tmp_path / fmt)
        assert report.fits
        assert_same_weights(second, model)
        assert second.config.to_dict() == first.config.to_dict()
        assert second_processor.settings == processor.settings
        assert second_processor.tokenizer("a <SEG> b").input_ids == processor.tokenizer("a <SEG> b").input_ids


@pytest.mark.parametrize("route", [MedPLIBForCausalLM, AutoModelForCausalLM])
def test_native_loads_through_transformers(make, tmp_path: Path, route) -> None:
    model, processor = make()
    save(model, processor, tmp_path / "native", max_shard=50_000)
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    loaded = route.from_pretrained(tmp_path / "native").eval()
    assert_same_weights(loaded, model)
    assert_same(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert AutoConfig.from_pretrained(tmp_path / "native").to_dict()["moe"] == model.config.to_dict()["moe"]


def test_what_transformers_saves_loads(make, tmp_path: Path) -> None:
    model, processor = make()
    model.save_pretrained(tmp_path / "native")
    processor.save_pretrained(tmp_path / "native")
    assert_same_weights(load(tmp_path / "native")[0], model)


def test_tied_embeddings_stay_tied_by_every_route(make, tmp_path: Path) -> None:
    """transformers stores a tied pair once, ours twice: either loads, through either."""
    original, processor = make()
    config = original.config
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = MedPLIBForCausalLM(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    save(model, processor, tmp_path / "ours")
    export_published(model, processor, tmp_path / "published")
    assert "lm_head.weight" not in load_file(tmp_path / "theirs" / "model.safetensors")
    for folder in ("theirs", "ours", "published"):
        loaded, _ = load(tmp_path / folder)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert_same_weights(loaded, model)
    for folder in ("theirs", "ours"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert_same_weights(loaded, model)
    assert "complete" in describe(tmp_path / "theirs")


def test_a_stored_head_is_never_tied_over(make, tmp_path: Path) -> None:
    model, processor = make()
    for folder, write in (("native", save), ("published", export_published)):
        write(model, processor, tmp_path / folder)
        file = tmp_path / folder / "config.json"
        settings = json.loads(file.read_text())
        for section in (settings, settings.get("text_config", settings), settings.get(NATIVE_SECTION, {})):
            section["tie_word_embeddings"] = True
        settings.get(NATIVE_SECTION, {}).get("text_config", {})["tie_word_embeddings"] = True
        file.write_text(json.dumps(settings))
        loaded, _, report = load_with_report(tmp_path / folder)
        assert_same_weights(loaded, model)
        assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
        assert any("lm_head is not the embedding; it was kept" in note for note in report.notes)
        save(loaded, processor, tmp_path / "again")
        assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


HEAD, MASK = "lm_head.weight", "model.mask_head.query.0.weight"


@pytest.mark.parametrize(
    ("spoil", "dtype", "named"),
    [
        (lambda state: state[HEAD][3].fill_(float("nan")), None, rf"in 1 tensors \({HEAD}\)"),
        (lambda state: state[MASK][0, 0].fill_(float("-inf")), torch.bfloat16, rf"in 1 tensors \({MASK}\)"),
        (lambda state: [value.fill_(float("inf")) for value in state.values()], None, r", …\)"),
        (lambda state: state[HEAD].fill_(1e6), torch.float16, rf"{HEAD} \(beyond torch.float16\)"),
        (lambda state: state.update({HEAD: state[HEAD].to(torch.int8)}), None, HEAD),
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_weights_that_are_no_numbers_are_named(
    make, tmp_path: Path, spoil: Any, dtype: Any, named: str, published: bool
) -> None:
    (export_published if published else save)(*make(), tmp_path / "it")
    state = load_file(tmp_path / "it" / "model.safetensors")
    if published:
        state = {published_to_native(name) or name: value for name, value in state.items()}
    spoil(state)
    if published:
        state = {native_to_published(name) or name: value for name, value in state.items()}
    save_file(state, tmp_path / "it" / "model.safetensors")
    with pytest.raises(MedPLIBError, match=named) as raised:
        load(tmp_path / "it", dtype=dtype)
    assert "\n" not in str(raised.value)


def test_loaded_network_computes_the_same(make, tmp_path: Path) -> None:
    model, processor = make()
    save(model, processor, tmp_path / "native")
    loaded, _ = load(tmp_path / "native")
    assert not loaded.training
    assert not [name for name, buffer in loaded.named_buffers() if buffer.is_meta]
    assert_same(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert_same(loaded.encode_images(image), model.encode_images(image))
    for name, parameter in model.named_parameters():  # what is never trained stays so
        assert loaded.get_parameter(name).requires_grad == parameter.requires_grad


def test_what_was_found_is_logged(make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(*make(), tmp_path / "native")
    with caplog.at_level("INFO"):
        load(tmp_path / "native", vision_tower=tmp_path / "clip")
    assert "tensors fit" in caplog.text
    assert f"{tmp_path / 'clip'} was not read" in caplog.text


def test_dtype_is_chosen_by_the_caller(make, tmp_path: Path) -> None:
    save(*make(), tmp_path / "native")
    loaded, _ = load(tmp_path / "native", dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.dtype == torch.bfloat16
    assert loaded.model.decoder.rotary_emb.inv_freq.dtype == torch.float32


def test_training_after_loading_leaves_the_file_alone(make, tmp_path: Path) -> None:
    model, processor = make()
    save(model, processor, tmp_path / "native")
    loaded, _ = load(tmp_path / "native")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert_same_weights(load(tmp_path / "native")[0], model)


def test_every_mismatch_is_listed_at_once(make, tmp_path: Path) -> None:
    save(*make(), tmp_path / "native")
    weights = tmp_path / "native" / "model.safetensors"
    state = load_file(weights)
    del state["model.mask_head.query.0.bias"]
    state["lm_head.weight"] = torch.zeros(3, 3)
    state["model.stranger"] = torch.zeros(1)
    save_file(state, weights)
    with pytest.raises(MedPLIBError) as raised:
        load(tmp_path / "native")
    message = str(raised.value)
    for expected in ("1 missing, 1 unexpected, 1 of another shape", "mask_head.query.0.bias", "stranger", "[3, 3]"):
        assert expected in message
    assert "does not load" in describe(tmp_path / "native")


def test_lenient_loading_renews_parts_and_reports(make, tmp_path: Path) -> None:
    model, processor = make()
    save(model, processor, tmp_path / "native")
    weights = tmp_path / "native" / "model.safetensors"
    state = load_file(weights)
    del state["model.mask_head.query.0.bias"]
    save_file(state, weights)
    loaded, _, report = load_with_report(tmp_path / "native", strict=False)
    assert report.missing == ("model.mask_head.query.0.bias",)
    assert torch.isfinite(loaded.model.mask_head.query[0].bias).all()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    del state["model.decoder.norm.weight"]
    save_file(state, weights)
    with pytest.raises(MedPLIBError, match=r"model\.decoder\.norm"):
        load(tmp_path / "native", strict=False)


def test_saving_over_a_checkpoint_keeps_other_files(make, tmp_path: Path) -> None:
    target = tmp_path / "native"
    save(*make(seed=0), target, max_shard=50_000)
    (target / "README.md").write_text("a model card")
    model, processor = make(seed=1)
    save(model, processor, target)
    assert_same_weights(load(target)[0], model)
    assert (target / "README.md").read_text() == "a model card"
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_a_failed_save_leaves_nothing(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "native"
    model, processor = make()
    save(model, processor, target)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving_module, "_write_json", full)
    with pytest.raises(MedPLIBError, match="No space left"):
        save(make(seed=1)[0], processor, target)
    with pytest.raises(MedPLIBError, match="No space left"):
        save(make(seed=1)[0], processor, tmp_path / "other")
    assert_same_weights(load(target)[0], model)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_a_directory_of_something_else_is_not_touched(make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(MedPLIBError, match="not a checkpoint"):
        save(*make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("options", [{"projector": {"type": "moe_mlp2x_gelu"}}, {"region": {"kind": "geometric"}}])
def test_parts_without_published_names_are_refused(make, tmp_path: Path, options: dict) -> None:
    model, processor = make(**options)
    with pytest.raises(MedPLIBError, match="native layout"):
        export_published(model, processor, tmp_path / "published")
    assert not list(tmp_path.iterdir())
    save(model, processor, tmp_path / "native")
    assert_same_weights(load(tmp_path / "native")[0], model)


def test_unmerged_lora_is_refused(make, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model, processor = make()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(MedPLIBError, match="merge_lora"):
        save(model, processor, tmp_path / "native")


def test_quantised_weights_are_refused(make, tmp_path: Path) -> None:
    """Their codes could be written, but nothing would read them."""
    model, processor = make()
    quantise(model, "int8")
    for write in (save, export_published):
        with pytest.raises(MedPLIBError, match=r"is quantised \(\d+ layers, the first model\.decoder.* load it again"):
            write(model, processor, tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_unknown_format_is_refused(make, tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="safetensors, bin"):
        export_published(*make(), tmp_path / "published", fmt="onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a mapping"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 2000), "cannot be read"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "no tokenizer"),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps(json.loads((folder / "config.json").read_text()) | {"moe": {"experts": 3}})
            ),
            "has no experts",
        ),
    ],
)
def test_damaged_directories_are_one_sentence(make, tmp_path: Path, damage, message: str) -> None:
    save(*make(), tmp_path / "native")
    damage(tmp_path / "native")
    with pytest.raises(MedPLIBError, match=message) as raised:
        load(tmp_path / "native")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"text_config": 5},
        {"text_config": {"hidden_size": "wide"}},
        {"text_config": {"num_attention_heads": 0}},
        {"text_config": {"hidden_size": -4}},
        {"text_config": {"hidden_act": "zzz"}},
        {"vision_config": {"patch_size": 0}},
        {"sam_config": {"vision_config": 3}},
        {"projector": {"type": 5}},
        {"region": {"kind": "weird"}},
        {"mask": {"geometry": "exakt"}},
        {"mask": {"threshold": 1.5}},
        {"vision_select_layer": "last"},
        {"conversation_turns": 0},
        {"conversation_turns": "many"},
        {"conversation_turns": True},
        {"moe": {"layers": [0], "num_experts": [1], "top_k": 2}},
    ],
)
def test_impossible_settings_are_one_sentence(make, tmp_path: Path, wrong: dict) -> None:
    save(*make(), tmp_path / "native")
    file = tmp_path / "native" / "config.json"
    settings = json.loads(file.read_text())
    for section, values in wrong.items():
        merged = settings[section] | values if isinstance(values, dict) else values
        file.write_text(json.dumps(settings | {section: merged}))
    with pytest.raises(MedPLIBError, match=r"config.*is not understood") as raised:
        load(tmp_path / "native")
    assert "\n" not in str(raised.value)


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(MedPLIBError, match="is no directory"):
        load(tmp_path / "nothing")


def test_description_names_every_part(make, tmp_path: Path) -> None:
    save(*make(), tmp_path / "native")
    text = describe(tmp_path / "native")
    for expected in ("native layout", "complete", "2 of 2 layers, 2 experts, top-1", "CLIP 28 px", "SAM 64 px"):
        assert expected in text
    assert "each question stands alone" in text
    file = tmp_path / "native" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"conversation_turns": 4}))
    assert "up to 4 questions" in describe(tmp_path / "native")
    model, processor = load(tmp_path / "native")
    save(model, processor, tmp_path / "again")
    assert load(tmp_path / "again")[0].config.conversation_turns == 4
