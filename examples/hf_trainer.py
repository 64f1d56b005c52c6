"""The dispersion loss in transformers.Trainer, in one method. Trains any causal language model of transformers on a
text.

pip install -e '.[trainer]' && python examples/hf_trainer.py MODEL TEXT.txt OUT      # MODEL: a folder or a hub name
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a clone, minidisp need not be installed

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
except ImportError as error:
    print(f"hf_trainer.py: {error}: pip install transformers accelerate", file=sys.stderr)
    sys.exit(2)

from minidisp import DispersionLoss, InputError
from minidisp.runtime.cli import Parser, exit_code


class DispersionTrainer(Trainer):
    weight, dispersion = 0.1, DispersionLoss(variant="angular_spread", layers="all")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # evaluation does not include the regulariser
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        disp = self.dispersion(outputs.hidden_states, self.state.global_step, inputs.get("attention_mask"))
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            disp = disp / self.current_gradient_accumulation_steps  # as Trainer does with the cross-entropy
        loss = loss + self.weight * disp
        return (loss, outputs) if return_outputs else loss


def main(model_name: str, text: str, out: str, length: int = 256, **arguments) -> DispersionTrainer:
    """Train on rows of `length` tokens, or of the model's context if shorter. arguments: those of TrainingArguments."""
    try:
        content = Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{text} is not UTF-8: save it as UTF-8") from None
    try:
        ids = AutoTokenizer.from_pretrained(model_name)(content, add_special_tokens=False)["input_ids"]
        context = getattr(AutoConfig.from_pretrained(model_name), "max_position_embeddings", length)
        length = min(length, context)
        if len(ids) < length:
            raise InputError(f"{text} has {len(ids)} tokens, but a row needs {length}: pass a longer text")
        model = AutoModelForCausalLM.from_pretrained(model_name)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # no such model, no network, or not a causal language model
        raise InputError(f"{model_name} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    arguments = {"num_train_epochs": 1, "learning_rate": 5e-5, "report_to": "none", **arguments}
    trainer = DispersionTrainer(
        model, TrainingArguments(out, **arguments), train_dataset=[{"input_ids": r, "labels": r} for r in rows]
    )
    trainer.train()
    return trainer


def cli(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (see exit_code)."""
    parser = Parser(prog="examples/hf_trainer.py", description=__doc__.partition("\n")[0])
    for name in ("MODEL", "TEXT", "OUT"):
        parser.add_argument(name)
    return exit_code("hf_trainer.py", lambda: main(*vars(parser.parse_args(argv)).values()))


if __name__ == "__main__":
    sys.exit(cli())
