"""What an attribution graph costs, in forwards of the plain model over the prompt, and the memory that it takes.

    python benchmarks/interventions/attribution_graphs.py
    python benchmarks/interventions/attribution_graphs.py --layers 30 --hidden 576 --features 4096 16384 65536

A random model of Llama's kind, with random transcoders of every layer, of which about 2 % of the features are active.
One process, one thread, CPU time. Memory is what the peak of the process grows by during the call, beyond the
transcoders.
"""

import argparse
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnterp import Dictionary, StandardizedTransformer
from nnterp.interventions import attribution_graph
from nnterp.testing import tiny_tokenizer
from nnterp.traced import Activation


def transcoders(model, features):
    width = model.hidden_size

    def one(layer):
        return Dictionary(
            encoder=torch.randn(features, width) / width**0.5,
            encoder_bias=torch.full((features,), -2.05),
            decoder=torch.randn(features, width) / width,
            decoder_bias=torch.zeros(width),
            activation=Activation(),
            reads=f"mlps_input[{layer}]",
            writes=f"mlps_output[{layer}]",
        )

    return {layer: one(layer) for layer in range(model.num_layers)}


def timed(call):
    begin = time.process_time()
    found = call()
    return time.process_time() - begin, found


def peak():
    """The largest memory of the process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--features", type=int, nargs="*", default=[1024, 4096, 16384])
    parser.add_argument("--most", type=int, default=256, help="max_features")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": 8}
    config = LlamaConfig(**shape, intermediate_size=4 * args.hidden, vocab_size=4096)
    model = StandardizedTransformer(LlamaForCausalLM(config).eval(), tokenizer=tiny_tokenizer())
    ids = torch.randint(10, 400, (args.length,)).tolist()

    @torch.no_grad()
    def forward():
        return model._module(input_ids=torch.tensor([ids]), use_cache=False)

    forward()
    base = min(timed(forward)[0] for _ in range(5))
    attribution_graph(model, transcoders(model, 64), ids, max_features=8, progress=False)
    for features in args.features:
        own = transcoders(model, features)
        before = peak()
        seconds, graph = timed(
            lambda own=own: attribution_graph(model, own, ids, max_features=args.most, progress=False)
        )
        cost, nodes = graph.about["cost"], graph.about["cost"]["nodes"]
        print(
            f"{features} features a layer, {graph.active} active, {nodes} targets: {cost['forwards']} forwards and "
            f"{cost['backwards']} backwards of the prompt; {seconds / base:.0f} plain forwards "
            f"({seconds / base / nodes:.2f} a target), {peak() - before:.0f} MiB"
        )


if __name__ == "__main__":
    main()
