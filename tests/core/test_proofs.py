"""Proofs on disk: what is restored is what certifying gives, and nothing stale, foreign or damaged is ever used."""

import dataclasses
import json
import multiprocessing
import os
import shutil

import pytest
import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nnterp
from nnterp import RenameConfig, StandardizedTransformer
from nnterp.certificate import certify
from nnterp.cli.proofs import configure, run
from nnterp.facts import Facts
from nnterp.proofs import What, clear, folder, kept, proven
from nnterp.proofs import _certified as certified_room
from nnterp.proofs import _folder as folder_room
from nnterp.proofs import _key as key_room
from nnterp.proofs import _shelf as shelf_room
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.traced import Inside

# Post-norms and softcaps; a stream stored in another layout; experts; recurrent states; constants per channel.
TYPES = ("gemma2", "xlnet", "mixtral", "mamba2", "bert")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for proofs of this test alone."""
    monkeypatch.setenv("NNTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "proofs"


@pytest.fixture
def certifying(monkeypatch):
    """The models that were certified by running them."""
    ran = []

    def watched(model):
        ran.append(model)
        return certify(model)

    monkeypatch.setattr(certified_room, "certify", watched)
    return ran


@pytest.fixture
def said():
    """What nnterp wrote to its log."""
    lines = []
    sink = logger.add(lines.append, format="{level} {message}")
    logger.enable("nnterp")
    yield lines
    logger.disable("nnterp")
    logger.remove(sink)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A llama saved to a folder."""
    return saved("llama", tmp_path_factory.mktemp("llama"))


def saved(model_type, where):
    tiny_model(model_type).save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


def load(where, **options):
    model = StandardizedTransformer(str(where), **options)
    model.dispatch()
    return model


def alike(one, other):
    """Whether two values are equal in type and content, tensors bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    return alike(vars(one), vars(other)) if hasattr(one, "__dict__") else one == other


def every_fact(model):
    found = {f.name: getattr(model.facts, f.name) for f in dataclasses.fields(Facts)}
    del found["look_inside"], found["look_for_states"], found["places"]
    absent = dict(found["anatomy"].absent)
    found["anatomy"] = dataclasses.replace(found["anatomy"], absent=absent)
    return found | {"inside": model.facts.inside, "states": model.facts.states}


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_restored_is_what_certifying_gives(model_type, tmp_path, cache, certifying):
    where = saved(model_type, tmp_path / "model")
    first, second = load(where), load(where)
    assert certifying == [first, first]  # without weights, and with them
    without = load(where, keep_proofs=False)
    lines = [dataclasses.replace(own.certificate, seconds=0.0) for own in (first, second, without)]
    assert lines[0] == lines[1] == lines[2]
    facts = [every_fact(own) for own in (first, second, without)]
    for name in facts[0]:
        assert alike(facts[0][name], facts[1][name]), name
        assert alike(facts[0][name], facts[2][name]), name
    ids = torch.tensor([[5, 6, 7, 8]])
    for value in ("layers_mid", "mlp_contributions", "attention_probabilities", "mixer_states"):
        for layer in range(first.num_layers):
            assert str(place_of(first, value, layer)) == str(place_of(second, value, layer))
    with first.trace(ids), torch.no_grad():
        expected = first.logits.save()
    with second.trace(ids), torch.no_grad():
        found = second.logits.save()
    assert torch.equal(expected, found)


def place_of(model, value, layer):
    try:
        return model.place(value, layer)
    except nnterp.errors.Unavailable as error:
        return error


def test_the_stream_between_two_parts_is_read_and_written_from_a_restored_proof(checkpoint, cache, certifying):
    load(checkpoint)
    del certifying[:]
    model, ids = load(checkpoint), torch.tensor([[5, 6, 7, 8]])
    seen = []
    norm = model._module.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model._module(ids)
        handle.remove()
        with model.trace(ids):
            model.attentions_input[1].sum()  # the layer has begun
            mid = model.layers_mid[1].save()
    assert not certifying
    assert torch.equal(mid, seen[0])


# -- the key -----------------------------------------------------------------------------------------------------------


def test_each_part_of_the_key_counts(checkpoint, cache, said, monkeypatch):
    """Each part changed alone: the proof that is there is not used, and the log names the part."""
    model = load(checkpoint)
    what = What("answer", "an answer")
    own = key_room.key_of(model, what)
    assert proven(model, what, lambda: "first") == "first"
    for name in own:
        changed = {**own, name: "changed"}
        if name == "name":
            continue  # another folder; below
        del said[:]
        assert proven(model, what, lambda: "second", worth=lambda _: False, key=lambda *_, c=changed: c) == "second"
        assert f"proven with another {name}" in said[0]
    assert proven(model, what, lambda: "third", worth=lambda _: False, key=lambda *_: {**own, "name": "x"}) == "third"
    assert proven(model, what, lambda: "fourth") == "first"


def _weights(model):
    model._module.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3


def _swap(model):
    data = model._module.model.embed_tokens.weight.data
    data[[10, 60]] = data[[60, 10]]


def _swap_neighbours(model):
    data = model._module.model.embed_tokens.weight.data  # rows of 256 bytes
    data[[400, 401]] = data[[401, 400]]


def _buffer(model):
    model._module.model.rotary_emb.inv_freq.data.mul_(1.01)


def _config(model):
    model._module.config.rms_norm_eps = 0.5


def _attribute(model):
    model._module.model.layers[0].self_attn.scaling = 0.5


def _attention(model):
    model._module.config._attn_implementation_internal = "eager"


def _tokenizer(model):
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})


def _padding_side(model):
    model.tokenizer.padding_side = "right"


def _rename(model):
    model.rename_config = RenameConfig(mlp_name="mlp")


def _dtype(model):
    model._module.to(torch.bfloat16)


def _training(model):
    model._module.train()


CHANGES = {
    "weights": [_weights, _swap, _swap_neighbours, _buffer],
    "config": [_config],
    "modules": [_attribute, _training],
    "attention": [_attention],
    "tokenizer": [_tokenizer, _padding_side],
    "RenameConfig": [_rename],
    "dtype": [_dtype],
}


@pytest.mark.parametrize(("part", "change"), [(p, c) for p, changes in CHANGES.items() for c in changes])
def test_a_changed_model_has_another_key(part, change, checkpoint, cache):
    model, what = load(checkpoint, keep_proofs=False), What("answer", "an answer")
    model.keep_proofs = True
    before = key_room.key_of(model, what)
    assert key_room.key_of(model, what) == before
    change(model)
    after = key_room.key_of(model, what)
    assert after[part] != before[part]


def _other_forward(self, hidden_states):
    return hidden_states * 2


@pytest.mark.parametrize("part", ["model's code", "a function of it", "attention function", "settings", "version"])
def test_changed_code_has_another_key(part, checkpoint, cache, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    model, what = load(checkpoint, keep_proofs=False), What("answer", "an answer")
    model.keep_proofs = True
    before = key_room.key_of(model, what)
    if part == "model's code":
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", _other_forward)
    elif part == "a function of it":
        monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -x)
    elif part == "attention function":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **kwargs: None)
    elif part == "settings":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", not torch.backends.mkldnn.enabled)
    else:
        monkeypatch.setattr(key_room, "version_of", lambda name: f"another {name}")
    after = key_room.key_of(model, what)
    differ = {name for name in before if before[name] != after[name]}
    expected = {"settings": {"settings of torch"}, "version": set(key_room.VERSIONS)}
    assert differ == expected.get(part, {"model's code"})


@pytest.mark.parametrize(
    "how", ["other weights", "same size, later", "times put back", "shard in a folder", "config", "dtype"]
)
def test_a_changed_checkpoint_is_certified_anew(how, checkpoint, tmp_path, cache, certifying):
    where, options = tmp_path / "model", {}
    shutil.copytree(checkpoint, where)
    if how == "shard in a folder":
        shard_in_a_folder(where)
    load(where)
    assert len(certifying) == 2
    file = where / "model.safetensors"
    if how == "other weights":
        tensors = load_file(file)
        tensors["model.layers.0.mlp.down_proj.weight"] *= 1.5
        save_file(tensors, file, metadata={"format": "pt"})
    elif how in ("same size, later", "times put back"):
        state, content = file.stat(), bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        if how == "times put back":
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif how == "shard in a folder":
        content = bytearray((where / "parts" / "one.safetensors").read_bytes())
        content[-2] ^= 1
        (where / "parts" / "one.safetensors").write_bytes(content)
    elif how == "config":
        config = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    else:
        options = {"dtype": torch.bfloat16}
    del certifying[:]
    load(where, **options)
    assert certifying


def shard_in_a_folder(where):
    """Put the weights into a folder inside, named by an index."""
    file = where / "model.safetensors"
    (where / "parts").mkdir()
    names = list(load_file(file))
    file.rename(where / "parts" / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "parts/one.safetensors")}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))


def test_only_a_checkpoint_as_it_was_loaded_has_proofs(checkpoint, cache):
    model, what = load(checkpoint, keep_proofs=False), What("answer", "an answer")
    assert key_room.key_of(model, what) == "the model was loaded with keep_proofs=False"
    model.keep_proofs = True
    assert isinstance(key_room.key_of(model, what), dict)
    layer = model._module.model.layers[0]
    handle = layer.register_forward_hook(lambda *_: None)
    assert "layers.0 has hooks" in key_room.key_of(model, what)
    handle.remove()
    with model.steering({1: torch.ones(model.hidden_size)}):
        assert "steered" in key_room.key_of(model, what)
    model._module.config.quantization_config = {"bits": 4}
    assert "quantised" in key_room.key_of(model, what)
    del model._module.config.quantization_config
    model._module.peft_config = {}
    assert "adapter" in key_room.key_of(model, what)
    del model._module.peft_config
    forward = layer.mlp.__dict__["forward"]
    layer.mlp.__dict__["forward"] = lambda x: x
    assert "replaced" in key_room.key_of(model, what)
    layer.mlp.__dict__["forward"] = forward
    assert isinstance(key_room.key_of(model, what), dict)
    given = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    assert "given as a module" in key_room.key_of(given, what)
    unproven = load(checkpoint, check_renaming=False)
    assert "not proven" in key_room.key_of(unproven, what)


def test_weights_edited_in_memory_take_no_proof_of_their_files(checkpoint, cache, said):
    load(checkpoint).facts.inside
    model = load(checkpoint)
    model._module.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    del said[:]
    model.facts.inside
    assert "proving where values inside its layers are" in said[0]
    assert "proven with another weights" in said[0]


def test_validate_proves_anew_and_keeps_nothing_of_an_edited_model(checkpoint, cache, certifying):
    model = load(checkpoint)
    model._module.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    files = kept().files
    del certifying[:]
    assert model.validate().ok
    assert certifying == [model]
    assert kept().files == files


# -- the disk ----------------------------------------------------------------------------------------------------------


def _truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def _half(file):
    file.write_bytes(file.read_bytes()[:40])


def _empty(file):
    file.write_bytes(b"")


def _pickled(file):
    file.write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")


def _huge_header(file):
    file.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")


def _bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _rewritten(change):
    def damage(file):
        with safe_open(file, framework="pt") as opened:
            record = json.loads(opened.metadata()["record"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        change(record)
        shelf_room.write_tensors(file, tensors, record, "proof")

    return damage


def _of_another(record):
    record["key"]["torch"] = "0.1"


def _unknown_class(record):
    record["proof"] = ["object", "Popen", "touch hacked"]


def _wrong_types(record):
    record["proof"] = json.loads(json.dumps(record["proof"]).replace('["float", ', '["text", 0, '))


def _no_facts(record):
    record["proof"] = ["dict"]


def _deep(record):
    form = 1
    for _ in range(500):
        form = ["list", form]
    record["proof"] = form


DAMAGE = [_truncated, _half, _empty, _pickled, _huge_header, _bit]
DAMAGE += [_rewritten(change) for change in (_of_another, _unknown_class, _wrong_types, _no_facts, _deep)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_file_is_ignored_and_made_anew(damage, checkpoint, cache, certifying, said):
    first = load(checkpoint)
    (file,) = cache.glob("*/certificate-*")
    damage(file)
    del certifying[:], said[:]
    again = load(checkpoint)
    assert certifying == [again]
    assert any(line.startswith("WARNING") and str(file) in line for line in said)
    assert again.certificate.lines == first.certificate.lines
    del certifying[:]
    load(checkpoint)
    assert not certifying


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_a_proof_of_another_user_is_ignored(checkpoint, cache, certifying, monkeypatch):
    load(checkpoint)
    del certifying[:]
    load(checkpoint)
    assert not certifying
    monkeypatch.setattr(shelf_room.os, "getuid", lambda: os.stat(checkpoint).st_uid + 1)
    load(checkpoint)
    assert certifying


def test_a_proof_is_json_and_tensors(checkpoint, cache):
    load(checkpoint)
    files = sorted(file for file in cache.rglob("*") if file.is_file())
    assert [file.name.partition("-")[0] for file in files] == ["certificate", "shapes"]
    for file in files:
        with safe_open(file, framework="pt") as opened:
            json.loads(opened.metadata()["record"])


def test_a_disk_that_cannot_be_written_costs_a_line(checkpoint, tmp_path, monkeypatch, said):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NNTERP_CACHE", str(tmp_path / "file"))
    assert load(checkpoint).certificate.ok
    assert any(line.startswith("WARNING") and "not kept" in line for line in said)


def test_a_full_disk_costs_a_line_and_leaves_nothing(checkpoint, cache, monkeypatch, said):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnterp.files.save_file", full)
    assert load(checkpoint).certificate.ok
    assert any("No space left" in line for line in said)
    assert not [file for file in cache.rglob("*") if file.is_file()]


def _write_often(where, text):
    what, key = What("answer", "an answer"), {"name": "model"}
    for _ in range(30):
        shelf_room._keep(where, shelf_room._file(where, what, key), what, key, [text] * 500)


def test_two_processes_write_at_once(cache):
    what, key = What("answer", "an answer"), {"name": "model"}
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(cache, text)) for text in ("one", "other")]
    for writer in writers:
        writer.start()
    found = set()
    while any(writer.is_alive() for writer in writers):
        try:
            read = shelf_room._read(shelf_room._file(cache, what, key), what, key)
        except (FileNotFoundError, ValueError):  # not there yet, or replaced while it was opened
            continue
        assert len(read) == 500
        found.add(*set(read))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert found <= {"one", "other"}
    assert found
    assert kept().files == 1


def test_a_failed_certificate_is_not_kept(tmp_path, cache):
    where = saved("llama", tmp_path / "model")
    with pytest.raises(nnterp.errors.CertificateError):
        load(where, rename_config=RenameConfig(attn_name="mlp", mlp_name="self_attn"))
    assert not list(cache.glob("*/certificate-*"))


def test_what_cannot_be_written_is_not_kept(checkpoint, cache, said):
    model = load(checkpoint)
    assert proven(model, What("answer", "an answer"), object) is not None
    assert "cannot be written" in said[-1]
    place = Inside("model.layers.0", ("a", "b"), "input", "key")
    for value in (place, {1: (2.5, float("inf"), None, True)}, {"x"}, torch.Size([2]), [torch.tensor([0.1])], "ü" * 99):
        what = What(f"answer-{type(value).__name__}", "an answer", (Inside,))
        assert proven(model, what, lambda v=value: v) is value
        assert alike(proven(model, what, lambda: pytest.fail("proven again")), value)


# -- without weights ---------------------------------------------------------------------------------------------------


def test_the_twin_is_proven_once(checkpoint, cache, monkeypatch):
    first = StandardizedTransformer(str(checkpoint), remote=True)
    first.learn_from_twin()
    without = StandardizedTransformer(str(checkpoint), remote=True, keep_proofs=False)
    without.learn_from_twin()
    monkeypatch.setattr(nnterp.standardized_transformer, "build_twin", lambda _: pytest.fail("built again"))
    second = StandardizedTransformer(str(checkpoint), remote=True)
    second.learn_from_twin()
    assert second.facts.proof == "twin"
    facts = [every_fact(model) for model in (first, second, without)]
    assert all(alike(facts[0][name], facts[1][name]) for name in facts[0])
    assert all(alike(facts[0][name], facts[2][name]) for name in facts[0])


# -- off, and clear ----------------------------------------------------------------------------------------------------


def test_off(checkpoint, cache, certifying, monkeypatch, said):
    load(checkpoint, keep_proofs=False)
    assert not cache.exists()
    monkeypatch.setenv("NNTERP_CACHE", "off")
    load(checkpoint)
    assert len(certifying) == 4
    assert folder() is None
    assert "NNTERP_CACHE is off" in said[-1]
    assert "not kept" in str(kept())


def test_the_command_says_what_is_there_and_clears_it(checkpoint, cache, capsys):
    import argparse

    load(checkpoint)
    parser = argparse.ArgumentParser()
    configure(parser)
    assert run(parser.parse_args([])) == 0
    assert f"2 proofs, 0.0 MB, in {cache}" in capsys.readouterr().out
    (draft := next(cache.glob("*")) / ".shapes-x.safetensors.0123").write_text("a killed process left this")
    assert run(parser.parse_args(["--clear"])) == 0
    assert not draft.exists()
    assert not list(cache.iterdir())
    assert clear().files == 0


def test_the_files_longest_unused_are_deleted(checkpoint, cache, monkeypatch):
    monkeypatch.setattr(folder_room, "AT_MOST", 3)
    model = load(checkpoint)
    for i in range(4):
        proven(model, What(f"answer{i}", "an answer"), lambda: "it")
    assert sorted(file.name[:7] for file in cache.glob("*/*")) == ["answer1", "answer2", "answer3"]
