"""The dispersion loss in transformers.Trainer: one method. Trains any causal language model of transformers on a text file.

pip install -e '.[trainer]' && python examples/hf_trainer.py MODEL TEXT.txt OUT      # MODEL: a folder, or a name on the hub
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from minidisp import DispersionLoss


class DispersionTrainer(Trainer):
    weight, dispersion = 0.1, DispersionLoss(variant="angular_spread", layers="all")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # the regulariser is no part of an evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        disp = self.dispersion(
            outputs.hidden_states, self.state.global_step
        )  # every token counts: pack texts, do not pad
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            disp = disp / self.current_gradient_accumulation_steps  # where Trainer has done so with the cross-entropy
        loss = loss + self.weight * disp
        return (loss, outputs) if return_outputs else loss


def main(model_name: str, text: str, out: str, length: int = 256, **arguments) -> DispersionTrainer:
    tokenizer, model = AutoTokenizer.from_pretrained(model_name), AutoModelForCausalLM.from_pretrained(model_name)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    arguments = {"num_train_epochs": 1, "learning_rate": 5e-5, "report_to": "none", **arguments}
    trainer = DispersionTrainer(
        model, TrainingArguments(out, **arguments), train_dataset=[{"input_ids": r, "labels": r} for r in rows]
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4])
