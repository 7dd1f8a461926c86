"""Find a model's parts: the user's names, then transformers' own declarations, then structure and known names."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from nnterp.anatomy import _names
from nnterp.anatomy._anatomy import Anatomy, Layer, Part
from nnterp.anatomy._rename import RenameConfig
from nnterp.anatomy._sizes import Sizes, inner_width, read_sizes
from nnterp.errors import AnatomyError


def find_anatomy(model: nn.Module, rename_config: RenameConfig | None = None) -> Anatomy:
    """Read from a HuggingFace causal LM which module plays which part. Nothing is run, weights may be on `meta`.

    Args:
        model: The model, e.g. what `AutoModelForCausalLM.from_pretrained` returns.
        rename_config: Names that come before everything nnterp would guess.

    Returns:
        The parts by native path. What is found here is a claim: `nnterp.certificate` proves it by running the model.

    Raises:
        AnatomyError: A name in `rename_config` matches nothing, or a part every causal LM has was not found; the
            message says which `RenameConfig` field cures it and shows the modules to choose from.
    """
    return _Finder(model, rename_config or RenameConfig()).anatomy()


@dataclass
class _Finder:
    model: nn.Module
    rename: RenameConfig

    def __post_init__(self) -> None:
        self.paths: dict[int, str] = {}
        for path, module in self.model.named_modules():
            self.paths.setdefault(id(module), path)
        self.absent: dict[str, str] = {}
        self.other_stacks: tuple[str, ...] = ()
        self.missing: list[tuple[str, str]] = []
        name = type(self.model).__name__
        self.prefix = re.sub(r"(For[A-Z].*|LMHead.*|WithLMHead.*|Decoder)$", "", name)

    def anatomy(self) -> Anatomy:
        layers = self.find_layers()
        blocks = self.find_blocks(layers)
        head = self.find_head(layers)
        norm = self.find_norm(layers, head)
        embed = self.find_embedding()
        if self.missing:
            raise AnatomyError(self.describe_missing())
        config = self.model.config
        return Anatomy(
            model_class=type(self.model).__name__,
            model_type=getattr(config, "model_type", ""),
            embed_tokens=embed,
            layers=layers,
            ln_final=norm,
            lm_head=head,
            blocks=blocks,
            sizes=self.sizes(layers, blocks),
            absent=MappingProxyType(dict(self.absent)),
            other_stacks=self.other_stacks,
        )

    # -- the model's own parts -------------------------------------------------------------------------------------

    def find_layers(self) -> str:
        asked = self.user_path("layers_name", self.backbones())
        if asked is not None:
            if not _children(self.model.get_submodule(asked)):
                raise AnatomyError(
                    f"RenameConfig(layers_name={asked!r}) names a module without children, not a list of layers."
                )
            return asked
        lists = list(self.block_lists())
        declared = self.declared("hidden_states")
        if declared:
            found = [
                path for path in lists if any(isinstance(block, declared) for block in self.model.get_submodule(path))
            ]
            lists = found or lists
        decoder = self.decoder_path()
        if decoder is not None:
            lists = [path for path in lists if path.startswith(decoder)] or lists
        lists = [path for path in lists if not _SIDE.search(path)] or lists
        known = [path for path in lists if path.rpartition(".")[2] in _names.LAYERS]
        lists = known or lists
        if not lists:
            raise AnatomyError(
                f"{type(self.model).__name__} has no list of layers that nnterp recognises: no ModuleList whose "
                f"entries hold modules of their own. Name it with RenameConfig(layers_name=...). The model's modules:\n"
                + _tree(self.model, depth=3)
            )
        stacks = {path.rpartition(".")[2]: path for path in lists}
        if len(lists) > 1 and len(stacks) == 1:
            # Of a chain of stacks, the decoder's stream makes the logits; the readout's proof has the last word.
            decoders = [path for path in lists if "decoder" in path]
            if len(decoders) == 1 and not getattr(self.model.config, "is_encoder_decoder", False):
                self.other_stacks = tuple(path for path in lists if path != decoders[0])
                return decoders[0]
            raise AnatomyError(
                f"{type(self.model).__name__} has {len(lists)} stacks of layers ({', '.join(lists)}), so there is no "
                "one residual stream from embedding to logits. A stack whose layers run once in a forward pass can "
                f"be named, as in RenameConfig(layers_name={lists[0]!r}); one whose layers run repeatedly cannot."
            )
        return max(lists, key=lambda path: sum(p.numel() for p in self.model.get_submodule(path).parameters()))

    def sizes(self, layers: str, blocks: tuple[Layer, ...]) -> Sizes:
        """What the config states, and the width of the feed-forwards, which GPT-2 and its kin do not state."""
        sizes = read_sizes(self.config_of(layers), len(blocks), self.rename)
        if sizes.intermediate_size is not None or sizes.hidden_size is None:
            return sizes
        ends = [(b.mlp.entry, b.mlp.exit) for b in blocks if b.mlp is not None and not b.mixture_of_experts]
        modules = (
            [m for path in dict.fromkeys(pair) for m in self.model.get_submodule(path).modules()] for pair in ends
        )
        return dataclasses.replace(sizes, intermediate_size=inner_width(modules, sizes.hidden_size))

    def config_of(self, layers: str) -> Any:
        """The config that speaks of the layers: of one stack among several, its own."""
        if not self.other_stacks:
            return self.model.config
        owners = (self.model.get_submodule(path) for path in _ancestors(layers))
        return next(owner.config for owner in owners if isinstance(getattr(owner, "config", None), PreTrainedConfig))

    def block_lists(self) -> Iterator[str]:
        """Outermost ModuleLists whose entries are blocks (hold modules of their own)."""
        outer: list[str] = []
        for path, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) == 0:
                continue
            if any(path.startswith(f"{other}.") for other in outer):
                continue
            if all(_children(block) for block in module):
                outer.append(path)
                parts = {type(child) for block in module for child in block.children()}
                if len(parts) > 1:
                    yield path

    def find_embedding(self) -> str | None:
        try:
            module = self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            module = None
        path = self.paths.get(id(module)) if module is not None else None
        if isinstance(module, nn.ModuleList):
            raise AnatomyError(
                f"{type(self.model).__name__} embeds its input with {len(module)} tables ({path}), one for each of as "
                "many rows of codes that it reads as one sequence: rows of its input are no rows of a residual stream, "
                "so nnterp cannot serve it."
            )
        if path is None:
            found = [p for p, m in self.model.named_modules() if isinstance(m, nn.Embedding)]
            named = [p for p in found if p.rpartition(".")[2] in _names.EMBED_TOKENS]
            path = next(iter(named or found), None)
        if path is None:
            self.absent["embed_tokens"] = "the model declares no input embedding"
        return path

    def find_head(self, layers: str) -> str | None:
        asked = self.user_path("lm_head_name", ("", *self.backbones()))
        if asked is not None:
            return asked
        try:
            module = self.model.get_output_embeddings()
        except (NotImplementedError, AttributeError):
            module = None
        path = self.paths.get(id(module)) if module is not None else None
        if path is None:
            path = next((name for name in _names.LM_HEAD if _child(self.model, name) is not None), None)
        if path is None:
            self.missing.append(("lm_head_name", f"the unembedding; the model's modules: {_listed(self.model)}"))
            return None
        # BERT's head is a transform and a projection: the head is the outermost module that holds both.
        while "." in path and not layers.startswith(path.rpartition(".")[0] + "."):
            path = path.rpartition(".")[0]
        return path

    def find_norm(self, layers: str, head: str | None) -> str | None:
        owners = list(_ancestors(layers))
        asked = self.user_path("ln_final_name", (*owners, *self.backbones()))
        if asked is not None:
            return asked
        for owner in owners:
            module = self.model.get_submodule(owner)
            for name in _names.LN_FINAL:
                child = _child(module, name)
                path = f"{owner}.{name}" if owner else name
                if child is not None and path != head and _is_norm(child):
                    return path
        self.absent["ln_final"] = "no norm follows the last layer"
        return None

    # -- the layers' parts -----------------------------------------------------------------------------------------

    def find_blocks(self, layers: str) -> tuple[Layer, ...]:
        modules = _children(self.model.get_submodule(layers))
        blocks = tuple(self.find_block(i, f"{layers}.{name}", module) for i, (name, module) in enumerate(modules))
        self.check_user_name("attn_name", [b.self_attn or b.mixer for b in blocks], modules)
        self.check_user_name("mlp_name", [b.mlp for b in blocks], modules)
        first = modules[0][1]
        if not any(b.mixer or b.self_attn or b.mlp for b in blocks) and self.parallel_lists(layers):
            raise AnatomyError(
                f"{type(self.model).__name__} has no layer modules: it keeps the parts of its layers in separate lists "
                f"({', '.join(self.parallel_lists(layers))}), so no module carries a layer's input and output."
            )
        if (
            not any(b.mixer or b.self_attn for b in blocks)
            and not self.rename.ignore_attn
            and "self_attn" not in self.absent
        ):
            self.missing.append(("attn_name", f"the attention inside a layer ({layers}.0 holds {_listed(first)})"))
        if not any(b.mlp for b in blocks) and not self.rename.ignore_mlp and self.unexplained(blocks[0], first):
            self.missing.append(("mlp_name", f"the feed-forward inside a layer ({layers}.0 holds {_listed(first)})"))
        if self.rename.ignore_mlp:
            self.absent["mlp"] = "RenameConfig(ignore_mlp=True)"
        if self.rename.ignore_attn:
            self.absent["self_attn"] = self.absent["mixer"] = "RenameConfig(ignore_attn=True)"
        return blocks

    def parallel_lists(self, layers: str) -> list[str]:
        """Lists beside `layers` that are as long as it: parts of layers kept apart (XLM)."""
        owner = layers.rpartition(".")[0]
        length = len(_children(self.model.get_submodule(layers)))
        lists = [
            name
            for name, m in self.model.get_submodule(owner).named_children()
            if isinstance(m, nn.ModuleList) and len(m) == length
        ]
        return lists if len(lists) > 1 else []

    def find_block(self, index: int, path: str, block: nn.Module) -> Layer:
        attention = mixer = mlp = None
        if not self.rename.ignore_attn:
            attention = self.part(block, self.rename.candidates("attn_name"), _names.SELF_ATTN, "Attention|Attn")
            mixer = self.part(block, (), _names.MIXERS, None)
        if not self.rename.ignore_mlp:
            mlp = self.part(block, self.rename.candidates("mlp_name"), _names.MLP, "MLP|Mlp|FeedForward|FFN|MoE|Moe")
            if mlp is None:
                mlp = self.span(block)
        kind, self_attn = "none", None
        if attention is not None:
            kind = self.kind(block.get_submodule(attention.path or attention.entry))
            if kind == "none":  # a class name that says nothing: the module's own name, or the user, says attention
                kind = "attention"
            if mixer is None:
                mixer = attention
            if kind == "attention":
                self_attn = attention
        if mixer is not None and mixer != attention:
            kind = self.kind(block.get_submodule(mixer.path or mixer.entry))
            if kind == "attention" and self_attn is None:
                self_attn = mixer
            elif kind == "none":  # Nemotron-H: one `mixer` per layer, which may be the feed-forward
                mixer, mlp = None, mlp or mixer
        moe = mlp is not None and _is_moe(block.get_submodule(mlp.path or mlp.entry))
        at = _At(path)
        several = tuple(part for part in map(at, self.several(block)) if part is not None)
        return Layer(index, path, kind, at(mixer), at(self_attn), at(mlp), moe, several)

    def several(self, block: nn.Module) -> list[Part]:
        """The attentions of a layer that keeps a list of them."""
        if self.rename.ignore_attn:
            return []
        lists = [(name, _child(block, name)) for name in _names.SELF_ATTN]
        return [
            Part.module(f"{name}.{i}")
            for name, module in lists
            if isinstance(module, nn.ModuleList)
            for i in range(len(module))
        ]

    def part(self, block: nn.Module, asked: Iterable[str], known: tuple[str, ...], classes: str | None) -> Part | None:
        for name in (*asked, *known):
            module = _child(block, name)
            if module is not None:
                return self.unwrap(name, module)
        # One level down (Zamba's hybrid layers hold whole sublayers), then by class name for names never seen.
        for outer, child in block.named_children():
            if not _is_norm(child) and not isinstance(child, nn.ModuleList):
                for name in known:
                    module = _child(child, name)
                    if module is not None:
                        return self.unwrap(f"{outer}.{name}", module)
        if classes is not None:
            found = [
                name
                for name, child in block.named_children()
                if re.search(classes, self.bare(child)) and not _is_norm(child)
            ]
            if len(found) == 1:
                return self.unwrap(found[0], block.get_submodule(found[0]))
        return None

    def unwrap(self, name: str, module: nn.Module) -> Part | None:
        """The sublayer proper inside a module that may also hold its norm and its residual addition."""
        if isinstance(module, nn.ModuleList):
            self.absent.setdefault(
                "self_attn",
                f"a layer holds {len(module)} attentions ({name}): index them with the layer and their number in it, "
                "as in attention_head_outputs[0, 1]",
            )
            return None
        if _child(module, "self") is not None and _child(module, "output.dense") is not None:
            return Part(name, f"{name}.self", f"{name}.output.dense")
        if any(_is_norm(child) for child in module.children()):
            for inner in (*_names.SELF_ATTN, *_names.MLP):
                if _child(module, inner) is not None:
                    return Part.module(f"{name}.{inner}")
            span = self.span(module)
            if span is not None:
                return Part(name, f"{name}.{span.entry}", f"{name}.{span.exit}")
            if _child(module, _names.CLOSING_NORM) is not None:
                return Part(name, name, name, f"{name}.{_names.CLOSING_NORM}")
        return Part.module(name)

    @staticmethod
    def span(block: nn.Module) -> Part | None:
        for first, last in _names.MLP_SPANS:
            if _child(block, first) is not None and _child(block, last) is not None:
                return Part(None, first, last)
        return None

    def kind(self, module: nn.Module) -> str:
        if any(name.startswith("time_decay") for name, _ in module.named_parameters(recurse=False)):
            return "recurrent"
        bare = self.bare(module)
        return next((kind for pattern, kind in _KIND_OF_CLASS if re.search(pattern, bare)), "none")

    def bare(self, module: nn.Module) -> str:
        """A class name without the model's own name, which may itself say "Linear" or "Mamba"."""
        return type(module).__name__.removeprefix(self.prefix)

    def unexplained(self, layer: Layer, block: nn.Module) -> list[str]:
        """Children of a block that hold weights, are no norms, and play no part that was found."""
        used = [part.path or part.entry for part in (layer.mixer, layer.self_attn, layer.mlp) if part is not None]
        return [
            name
            for name, child in block.named_children()
            if not _is_norm(child)
            and next(child.parameters(), None) is not None
            and not any(path.startswith(f"{layer.path}.{name}") for path in used)
        ]

    # -- what the model and the user declare -----------------------------------------------------------------------

    def declared(self, key: str) -> tuple[type, ...]:
        """Classes that transformers records as `key` ("hidden_states", "attentions") for this model."""
        classes: list[type] = []
        for module in self.model.modules():
            records = getattr(module, "_can_record_outputs", None) if hasattr(module, "config") else None
            if isinstance(records, dict) and key in records:
                entries = records[key]
                for entry in entries if isinstance(entries, list) else [entries]:
                    target = getattr(entry, "target_class", entry)
                    if isinstance(target, type):
                        classes.append(target)
        return tuple(classes)

    def decoder_path(self) -> str | None:
        try:
            decoder = self.model.get_decoder()
        except (NotImplementedError, AttributeError):
            return None
        path = self.paths.get(id(decoder))
        if path and any(isinstance(m, nn.ModuleList) for m in decoder.modules()):
            return f"{path}."
        return None

    def backbones(self) -> tuple[str, ...]:
        asked = self.rename.candidates("model_name")
        if asked and not any(_child(self.model, name) is not None for name in asked):
            raise AnatomyError(_no_match("model_name", asked, self.model, type(self.model).__name__))
        return tuple(
            name for name in (*asked, "", *_names.BACKBONES) if name == "" or _child(self.model, name) is not None
        )

    def user_path(self, field: str, owners: Iterable[str]) -> str | None:
        asked = self.rename.candidates(field)
        for name in asked:
            for owner in owners:
                path = f"{owner}.{name}" if owner else name
                module = _child(self.model, path)
                if module is not None:
                    return self.paths.get(id(module), path)
        if asked:
            raise AnatomyError(_no_match(field, asked, self.model, type(self.model).__name__))
        return None

    def check_user_name(self, field: str, parts: list[Part | None], blocks: list[tuple[str, nn.Module]]) -> None:
        """A name the user gave must have been used by some layer."""
        asked = self.rename.candidates(field)
        if asked and not any(_child(block, name) is not None for name in asked for _, block in blocks):
            raise AnatomyError(_no_match(field, asked, blocks[0][1], "a layer"))

    def describe_missing(self) -> str:
        fields = ", ".join(f"{field}=..." for field, _ in self.missing)
        lines = "\n".join(f"  {field}: {what}" for field, what in self.missing)
        return (
            f"nnterp does not recognise every part of {type(self.model).__name__}. "
            f"Pass rename_config=RenameConfig({fields}) with the names of:\n{lines}"
        )


# Side towers of multimodal models, which may hold larger stacks than the text decoder.
_SIDE = re.compile(r"(^|\.)(vision|visual|image|audio|speech|encoder_hash|patcher)")

_KIND_OF_CLASS = (
    ("CrossAtt", "cross_attention"),
    ("Delta|Linear|Lightning|Retention|KDA", "linear_attention"),
    ("Conv", "convolution"),
    ("Recurrent|LSTM|Rwkv|^Layer$", "recurrent"),
    ("Mamba|Mixer|SSM|S6|SSD", "state_space"),
    ("Att|Attn|MLA", "attention"),
)


@dataclass
class _At:
    """Makes a part's paths, relative to a layer, absolute."""

    layer: str

    def __call__(self, part: Part | None) -> Part | None:
        if part is None:
            return None
        path = None if part.path is None else f"{self.layer}.{part.path}"
        closing = None if part.closing is None else f"{self.layer}.{part.closing}"
        return Part(path, f"{self.layer}.{part.entry}", f"{self.layer}.{part.exit}", closing)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    # `_modules`, because `named_children` lists a module that is used twice only once.
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not _children(module)


def _is_moe(module: nn.Module) -> bool:
    """Whether a feed-forward routes tokens to experts."""
    return any(module._modules.get(name) is not None for name in ("experts", "router", "gate_router"))


def _listed(module: nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in _children(module)) or "no modules"


def _tree(module: nn.Module, depth: int, indent: str = "  ") -> str:
    lines: list[str] = []
    for name, child in _children(module):
        lines.append(f"{indent}{name}: {type(child).__name__}")
        if depth > 1:
            inner = _tree(child, depth - 1, indent + "  ")
            lines += [inner] if inner else []
        if isinstance(module, nn.ModuleList):
            lines.append(f"{indent}… {len(module)} in all")
            break
    return "\n".join(lines)


def _no_match(field: str, asked: list[str], module: nn.Module, where: str) -> str:
    """Say that a user's name matches nothing, and show the tree around the closest name there is."""
    paths = [path for path, _ in module.named_modules() if path]
    close = difflib.get_close_matches(asked[0], paths, n=3, cutoff=0.4) or difflib.get_close_matches(
        asked[0].rpartition(".")[2], [p.rpartition(".")[2] for p in paths], n=3, cutoff=0.4
    )
    around = module
    if close:
        matching = next(p for p in paths if p == close[0] or p.endswith(f".{close[0]}"))
        around = module.get_submodule(matching.rpartition(".")[0])
    hint = f" Close to it: {', '.join(dict.fromkeys(close))}." if close else ""
    wanted = asked[0] if len(asked) == 1 else asked
    return (
        f"RenameConfig({field}={wanted!r}) matches nothing in {where}.{hint} What is there:\n{_tree(around, depth=2)}"
    )
