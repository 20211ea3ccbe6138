"""MiniLM, fine-tuned on movie review snippets, loses a third of its heads and half of its feed-forward units.

Run: python examples/shrink_minilm_movie_snippets.py --data-file FILE [--checkpoint-dir FOLDER] [--threads 2]

The data, the model and the training are those of minilm_movie_snippets.py; with its --checkpoint-dir the
dense model is not trained again. One call of `fp.compress(structure="units")` finds what can be cut out of
the encoder (heads and feed-forward units; the layer norms need all of the residual stream), scores both by
the Fisher information, distils, and returns a BERT of smaller plain layers. A floor keeps 8 of the 12 heads
of each layer. Needs `pip install 'fastprune[structured]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fastprune as fp
import minilm_movie_snippets as recipe
from minilm_movie_snippets import Batches, SentenceClassifier

HEADS_LEFT = 8
UNITS_GONE = 0.5
ROUNDS = 1


def cut(
    model: SentenceClassifier,
    train: Batches,
    validation: Batches,
    *,
    example_inputs: list[dict[str, torch.Tensor]],
    rounds: int = ROUNDS,
    epochs: int = recipe.EPOCHS,
    heads_left: int = HEADS_LEFT,
    max_samples: int = recipe.SCORED_SNIPPETS,
    checkpoint_dir: Path | None = None,
    progress: bool = True,
) -> fp.CompressionResult:
    """Cut heads and units out of the encoder, and distil."""
    hidden = [f"bert.encoder.layer.{index}.output" for index in range(model.bert.config.num_hidden_layers)]

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return recipe.warm_up_then_fall(optimizer, epochs * len(train))

    return fp.compress(
        model,
        train,
        validation,
        structure="units",
        sparsity=UNITS_GONE,
        scope="layer",
        floor={"*.attention.output.dense": fp.Floor(units=heads_left)},
        rounds=rounds,
        epochs=epochs,
        criterion="fisher",
        hard_label_weight=0.2,
        optimizer=recipe.make_optimizer,
        distillation={
            "features": {name: name for name in hidden},
            "feature_weight": 1.0,
            "scheduler": schedule,
            "scheduler_interval": "step",
            "max_grad_norm": 1.0,
        },
        example_inputs=example_inputs,
        max_samples=max_samples,
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )


def main() -> None:
    """Fine-tune, cut, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-file", type=Path, required=True, help="movieReviewSnippets_GroundTruth.txt")
    parser.add_argument("--checkpoint-dir", type=Path, help="where models are kept, for runs that go on")
    parser.add_argument("--threads", type=int, help="of the whole run")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer, model = recipe.load_minilm()
    snippets, _ = recipe.tokenize(tokenizer, *recipe.read_snippets(arguments.data_file))
    parts = recipe.split(snippets, recipe.VALIDATION_SNIPPETS, recipe.TEST_SNIPPETS)
    train = Batches(parts[0], recipe.BATCH_SIZE, shuffle=True)
    validation, test = (Batches(part, 2 * recipe.BATCH_SIZE, shuffle=False) for part in parts[1:])
    folder = arguments.checkpoint_dir
    dense = recipe.trained(model, train, validation, checkpoint_dir=folder)
    inputs = recipe.example_inputs(parts[2])
    result = cut(
        dense,
        train,
        validation,
        example_inputs=inputs,
        checkpoint_dir=None if folder is None else folder / "units",
        progress=not arguments.quiet,
    )
    accuracies = [f"{entry['accuracy']:.2%}" for entry in result.history]
    print(f"units: {result.dense_accuracy:.2%} of validation, {', '.join(accuracies)}")
    layer = result.model.bert.encoder.layer[0]
    print(
        f"{layer.attention.self.num_attention_heads} heads, {layer.intermediate.dense.out_features} "
        "feed-forward units in each layer"
    )
    recipe.print_table(recipe.measure(dense, {"units": result}, test, inputs))
    print(f"{torch.get_num_threads()} threads, {fp.cpu_isa()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
