"""Write docs/gallery.md and its images: run each code snippet on the toy checkpoint and save its figure.

    uv run python tools/gallery.py

The page shows exactly the code that was run. Images need kaleido and a Chrome or Chromium.
"""

from __future__ import annotations

import argparse
import linecache
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch

from nnterp import display, toy_checkpoint

DOCS = Path(__file__).parents[1] / "docs"
VIEW_HEIGHT = 260  # pixels of a picture of a page with a text
LIMIT = 2_500_000  # bytes of all images together

HEAD = """\
# Gallery

Each figure comes with the code that drew it, on the model that is part of nnterp (`nnterp.toy_checkpoint()`). Figures
are `plotly.graph_objects.Figure`: hovering shows exact numbers, `figure.show()` shows the figure, and
`display.save(figure, "figure.html")` writes a page that opens offline (or a `.png` or `.svg`, with
`pip install 'nnterp-display[images]'`). With `plotlyjs="directory"` or `"cdn"` a page takes a few hundred kB at most,
and finds plotly.js beside it or on the web.

This page and its images are made by `uv run python tools/gallery.py`.

```python
{setup}
```
"""

SETUP = """\
from nnterp import StandardizedTransformer, display, toy_checkpoint

model = StandardizedTransformer(toy_checkpoint(), enable_attention_probs=True)
"""

SECTIONS = [
    (
        "lens",
        "Logit lens",
        "The token each layer would predict next, at each position (nostalgebraist, 2020). Bright is probable.",
        """\
        from nnterp.interventions import logit_lens_table

        text = "The Eiffel Tower is in the city of Paris. The capital of Italy is Rome. The capital of Japan is"
        lens = logit_lens_table(model, text)
        figure = lens.plot(tokenizer=model.tokenizer)
        """,
    ),
    (
        "lens-kl",
        "How far each layer is from the last",
        "KL from the last layer's distribution as the colour, `top_k` tokens in each cell, and every second layer.",
        """\
        figure = lens.plot(color="kl", top_k=3, every=2, positions=range(12, 22), title="Distance from the last layer")
        """,
    ),
    (
        "lens-entropy",
        "How certain each layer is",
        "The same lens, coloured by the entropy of each distribution.",
        """\
        figure = lens.plot(tokenizer=model.tokenizer, color="entropy", title="Entropy of the lens")
        """,
    ),
    (
        "lens-tuned",
        "Tuned lens",
        "The same text through a lens that was fitted first (Belrose et al., 2023): early layers are read better.",
        """\
        from nnterp.interventions import fit_tuned_lens

        countries = "Italy Japan Spain Germany Poland Kenya Peru Norway Egypt Chile".split()
        texts = [f"The capital of {one} is a city. The capital of {two} is" for one in countries for two in countries]
        fitted = fit_tuned_lens(model, texts, epochs=5, progress=False)
        figure = logit_lens_table(model, text, lens=fitted).plot(tokenizer=model.tokenizer)
        """,
    ),
    (
        "targets",
        "Targets over layers",
        "Probabilities of target categories over several prompts: the median, and a band over the middle half.",
        """\
        from nnterp.interventions import logit_lens
        from nnterp.prompts import Prompt, run_prompts

        capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Germany": "Berlin"}
        prompts = [
            Prompt.from_strings(f"The capital of {country} is", {"capital": city, "country": country}, model)
            for country, city in capitals.items()
        ]
        results = run_prompts(model, prompts, get_probs_func=logit_lens, tqdm=None)
        figure = results.plot(title="The capital emerges over depth")
        """,
    ),
    (
        "targets-odds",
        "Targets on a log-odds scale",
        "The same probabilities as log-odds: what happens near 0, before a target emerges, can be seen.",
        """\
        figure = results.plot(scale="logodds", title="The capital emerges over depth")
        """,
    ),
    (
        "patching",
        "Activation patching by position",
        "Which activations decide the indirect object: 1 is the clean run's logit difference, 0 the corrupted run's.",
        """\
        from nnterp.interventions import activation_patching, logit_difference

        clean = "When Mary and John went to the store, John gave a drink to"
        corrupted = "When Mary and John went to the store, Mary gave a drink to"
        patched = activation_patching(model, clean, corrupted, logit_difference(" Mary", " John"), progress=False)
        figure = patched.normalized().plot(tokenizer=model.tokenizer, score="normalised logit difference")
        """,
    ),
    (
        "patching-heads",
        "Activation patching by head",
        "The same pair of prompts, one attention head at a time.",
        """\
        by_head = activation_patching(
            model,
            clean,
            corrupted,
            logit_difference(" Mary", " John"),
            values="attention_head_outputs",
            heads="all",
            progress=False,
        )
        figure = by_head.normalized().plot(score="normalised logit difference")
        """,
    ),
    (
        "attention",
        "Attention of one head",
        "The head with the largest effect above. Query positions down, key positions across.",
        """\
        collected = model.collect(clean, "attention_probabilities")
        pattern = collected["attention_probabilities"][:, 0]  # [layers, heads, query, key]
        tokens = model.tokenizer(clean)["input_ids"]
        figure = display.plot_attention(pattern[4, 0], tokens, model.tokenizer, title="Layer 4, head 0")
        """,
    ),
    (
        "attention-wall",
        "A wall of heads",
        "All heads of all layers at once, to find the one to look at.",
        """\
        figure = display.plot_attention(pattern, tokens, model.tokenizer, title="Attention of every head")
        """,
    ),
    (
        "attention-text",
        "Attention over the text",
        "A page with a picker of layers and heads: the token under the mouse shades the tokens it attends to.",
        """\
        figure = display.plot_attention_text(pattern, tokens, model.tokenizer, title="Attention over the text")
        """,
    ),
    (
        "activations",
        "Neurons over the text",
        "A page with a picker of neurons: each token is shaded by the neuron's activation.",
        """\
        neurons = model.collect(clean, "mlp_neurons[3]")["mlp_neurons[3]"][0]  # [positions, neurons]
        strongest = neurons.amax(0).topk(20).indices
        figure = display.plot_activations(
            tokens, neurons[:, strongest], model.tokenizer, units=strongest, title="Neurons of layer 3"
        )
        """,
    ),
    (
        "surprise",
        "Loss and surprise",
        "Each token coloured by the loss on it. Hovering says what was expected instead.",
        """\
        ids = model.tokenizer(text)["input_ids"]
        with model.trace(text):
            logits = model.logits.save()  # [1, positions, vocab]
        figure = display.plot_surprise(logits[0], ids, model.tokenizer)
        """,
    ),
    (
        "tokens",
        "Tokens by a value",
        "A text in reading order, each token coloured by a number: here the entropy of what comes next.",
        """\
        entropy = lens["entropy"][0, -1]  # [positions], of the last layer
        figure = display.plot_tokens(ids, entropy, model.tokenizer, name="entropy (nats)", title="Where it is unsure")
        """,
    ),
    (
        "generation",
        "A generation, step by step",
        "The token that was taken at each step, and what was most probable there.",
        """\
        prompt = model.tokenizer("The capital of France is")["input_ids"]
        continued = model.tokenizer(" Paris. The capital of Italy is Rome.", add_special_tokens=False)["input_ids"]
        with model.trace([prompt + continued]):
            steps = model.logits.save()
        figure = display.plot_generation(steps[0, len(prompt) - 1 : -1], continued, model.tokenizer, top_k=4)
        """,
    ),
    (
        "side-by-side",
        "Two prompts side by side",
        "Any two figures on one page, with the same colours for the same numbers.",
        """\
        figure = display.side_by_side(
            *(
                logit_lens_table(model, f"The capital of {country} is").plot(color="entropy", title=country)
                for country in ("France", "Japan")
            ),
            title="Two prompts",
        )
        """,
    ),
    (
        "patchscope",
        "Patchscope",
        "Hidden states, read out by a target prompt that repeats words (Ghandeharioun et al., 2024).",
        """\
        from nnterp.interventions import patchscope_table

        readings = patchscope_table(model, ["The capital of France", "The capital of Japan", "Mary"], progress=False)
        figure = readings.plot(tokenizer=model.tokenizer)
        """,
    ),
    (
        "steering",
        "What steering does, and what it breaks",
        "A tone vector at three layers and five factors: its effect, against the divergence on neutral sentences.",
        """\
        from nnterp.interventions import steering_sweep, steering_vectors

        pleasant = ["I am happy. The weather today is", "What a wonderful day. The film was", "I love the city. I feel"]
        unpleasant = ["I am sad. The weather today is", "What a terrible day. The film was", "I hate the city. I feel"]
        vector = steering_vectors(model, pleasant, unpleasant)
        sweep = steering_sweep(
            model,
            vector,
            unpleasant,
            logit_difference(" lovely", " awful"),
            layers=[1, 4, 6],
            factors=[0.25, 0.5, 1, 2, 4],
            damage={"kl": ["The capital of France is Paris.", "The Eiffel Tower is in the city of Paris."]},
            progress=False,
        )
        figure = sweep.plot(title="Tone: effect against damage")
        """,
    ),
    (
        "probe",
        "Where two classes can be told apart",
        "A linear probe for European countries, on held-out ones, beside shuffled labels and random directions.",
        """\
        from nnterp.interventions import probe

        europe = "France Italy Spain Germany Poland Norway Sweden Greece Austria Portugal".split()
        elsewhere = "Japan China India Egypt Kenya Peru Chile Brazil Canada Mexico".split()
        texts = [f"{country} is on the continent of" for country in europe + elsewhere]
        probed = probe(model, texts, [True] * 10 + [False] * 10, folds=4)
        figure = probed.plot(title="European countries, held out")
        """,
    ),
    (
        "direct-attribution",
        "What each head adds to a logit",
        "Direct logit attribution: the parts add up to the logit difference.",
        """\
        from nnterp.interventions import direct_logit_attribution
        from nnterp.prompts.tasks import capitals

        task = capitals(model, 8)
        direct = direct_logit_attribution(model, task.clean, (task.correct, task.wrong), by="head")
        figure = direct.plot(prompts="mean")
        """,
    ),
    (
        "circuit",
        "A circuit",
        "The edges that carry capitals, by their gradients; every score is checked against exact runs in the audit.",
        """\
        from nnterp.interventions import edge_attribution, faithfulness

        metric = logit_difference(task.correct, task.wrong)
        circuit = edge_attribution(model, task.clean, task.corrupted, metric, method="integrated", progress=False)
        figure = circuit.top(40).plot()
        """,
    ),
    (
        "faithfulness",
        "Is the circuit faithful?",
        "The metric when all edges but the strongest are cut, beside random circuits of the same size.",
        """\
        found = faithfulness(model, circuit, task.clean, task.corrupted, metric, progress=False)
        figure = found.plot()
        """,
    ),
    (
        "heads",
        "Kinds of heads",
        "How far each head attends to the token before; rings mark heads beyond the null control.",
        """\
        from nnterp.interventions import head_scores

        figure = head_scores(model, "previous_token", progress=False).plot()
        """,
    ),
    (
        "features",
        "What a feature stands for",
        "The texts that activate a feature of a transcoder most, each token coloured by its activation there.",
        """\
        from nnterp import toy_dictionary
        from nnterp.interventions import feature_report

        transcoders = {layer: toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
        texts = [
            "The capital of Japan is Tokyo. The main language of Japan is Japanese.",
            "Kyoto is a city in Japan. The currency of Japan is the yen.",
            "Japan is on the continent of Asia.",
            "The capital of France is Paris. The main language of Italy is Italian.",
            "I love Japan because it is lovely. The weather today is nice.",
            "When Mary and John went to the store, John gave a drink to Mary.",
        ]
        report = feature_report(model, transcoders[0], texts, features=[206], progress=False)
        figure = report.plot(feature=206)
        """,
    ),
    (
        "attribution-graph",
        "Attribution graph",
        "Which features lead to the answer (Ameisen et al., 2025), pruned. Feature 206 of layer 0 stands for Japan.",
        """\
        from nnterp.interventions import attribution_graph

        graph = attribution_graph(model, transcoders, "The capital of Japan is", (" Tokyo", " Rome"), progress=False)
        names = {"L0 F206 @3": "Japan"}
        figure = graph.prune(0.6, 0.9).plot(labels=names, title="Why Tokyo, and not Rome?")
        """,
    ),
    (
        "topk",
        "Top tokens of each layer",
        "The figure of nnterp 1.x, one panel per prompt.",
        """\
        probs = logit_lens(model, ["The capital of France is", "The capital of Japan is"])
        figure = display.plot_topk_tokens(probs, model.tokenizer, k=4, show=False)
        """,
    ),
    (
        "dark",
        "Dark theme",
        "Any figure in the dark theme. Saved pages follow the reader's light or dark setting by themselves.",
        """\
        figure = display.with_theme(results.plot(title="The capital emerges over depth"), "dark")
        """,
    ),
    (
        "certificate",
        "The certificate",
        "What was proven about this model's names when it was loaded, line by line.",
        """\
        figure = display.plot_certificate(model.certificate)
        """,
    ),
]


def run(code: str, name: str, space: dict[str, Any]) -> None:
    """Run a section's code; its source can be read back, which traces need."""
    file = f"<gallery {name}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    exec(compile(code, file, "exec"), space)


def picture(figure: Any, path: Path) -> Path:
    """Write a figure, or what a browser shows of a page, as an image."""
    if not isinstance(figure, display.View):
        return display.save(figure, path, scale=1.25)
    browser = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    with tempfile.TemporaryDirectory() as folder:
        page = display.save(figure, Path(folder) / "view.html", theme="light")
        window = f"--window-size=900,{VIEW_HEIGHT if not figure.needs_plotly else figure.height}"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=4000",
            window,
        ]
        shot = [browser, *flags, f"--user-data-dir={folder}/profile", f"--screenshot={path}", page.as_uri()]
        subprocess.run(shot, check=True, capture_output=True, timeout=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where gallery.md and gallery/ go")
    parser.add_argument("--absent", action="store_true", help="draw only images that are not there")
    arguments = parser.parse_args()
    out = arguments.out
    torch.set_num_threads(1)
    space: dict[str, Any] = {}
    exec(SETUP, space)
    # Titles name the model; without this they would show a path of the machine that makes the page.
    space["model"].repo_id = "toy"
    object.__setattr__(space["model"].certificate, "model", "toy")
    page = [HEAD.format(setup=SETUP.strip())]
    size = 0
    for name, title, about, code in SECTIONS:
        code = textwrap.dedent(code).strip()
        run(code, name, space)
        path = out / "gallery" / f"{name}.png"
        if not (arguments.absent and path.exists()):
            picture(space["figure"], path)
        size += path.stat().st_size
        page.append(f"## {title}\n\n{about}\n\n```python\n{code}\n```\n\n![{title}](gallery/{name}.png)\n")
        print(f"{path.relative_to(out)}: {path.stat().st_size:,} bytes", flush=True)
    if size > LIMIT:
        raise SystemExit(f"The images take {size:,} bytes together; {LIMIT:,} are allowed.")
    (out / "gallery.md").write_text("\n".join(page), encoding="utf-8")
    print(f"{size:,} bytes in all; toy checkpoint: {Path(toy_checkpoint()).name}")


if __name__ == "__main__":
    main()
