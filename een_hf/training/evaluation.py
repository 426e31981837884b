"""The evaluation of a trainer: all exits, predictions by the policy, and calibration."""

from itertools import islice

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import PredictionOutput

from .._deprecated import renamed_argument
from ..evaluation import ExitCosts, cost_inputs, relative_costs, relative_latencies
from ..inference import ExitPredictions, predict
from ..models import EarlyExitMixin
from ..models.criteria import resolve_problem_type
from ..sharding import is_sharded, whole_copy
from .arguments import CostUnit
from .losses import COLLATED_LABELS


class EvaluationMixin:
    """The part of `EarlyExitTrainer` that evaluates exits, predicts and chooses a policy."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `Trainer`; the predictions are the logits of all exits, (batch, num_exits, num_labels)."""
        inputs = {**inputs, "early_exit": False}
        only_exit_logits = ["logits", "exit_index", "hidden_states", "attentions"]
        return super().prediction_step(model, inputs, prediction_loss_only, [*only_exit_logits, *(ignore_keys or [])])

    def predict_exits(self, dataset, metric_key_prefix: str = "test") -> PredictionOutput:
        """Evaluate every exit on every row.

        Args:
            dataset: as in `Trainer.predict`.
            metric_key_prefix: prefix of the names of the metrics.

        Returns:
            predictions (num_rows, num_exits, num_labels), labels and metrics.
        """
        return super().predict(dataset, metric_key_prefix=metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Predict by the model's exit policy; without a policy by its last exit.

        The rows are distributed over the processes and run through `een_hf.inference.predict`; each is read once.

        Args:
            test_dataset: a map-style data set, or a stream.
            ignore_keys: without effect, since only logits are predicted.
            metric_key_prefix: prefix of the names of the metrics.

        Returns:
            predictions (num_rows, num_labels); labels, if the rows have them; metrics, with `exit_fractions` if the
            model has an exit policy.
        """
        answers, kept = self._answer_rows(test_dataset)
        logits, labels, metrics = answers.logits.numpy(), None, {}
        label_column = next((name for name in COLLATED_LABELS if kept and name in kept[0]), None)
        if label_column is not None:
            labels = np.array([np.asarray(row[label_column]) for row in kept])
            if self.task_metrics is not None:
                targets, wanted, losses, inputs = torch.from_numpy(labels), self.args.include_for_metrics, None, None
                if "loss" in wanted:
                    losses = self._all_losses(answers.logits.unsqueeze(1), targets, (targets != -100).sum()).squeeze(1)
                if "inputs" in wanted:
                    inputs = _pad([row[self.network.main_input_name] for row in kept])
                metrics = self._metrics_of(answers.logits, targets, losses, inputs)
        config = self.network.config
        if config.exit_policy is not None:
            counts = np.bincount(answers.exit_index, minlength=len(config.exit_layers))
            metrics = {**metrics, "exit_fractions": (counts / max(len(logits), 1)).tolist()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=logits, label_ids=labels, metrics=metrics)

    def predict_dynamic(self, dataset) -> ExitPredictions:
        """As `een_hf.inference.predict`, with the rows distributed over the processes.

        Runs in the precision of the evaluation (`--bf16`, `--fp16`), in which the thresholds were calibrated.

        Args:
            dataset: a map-style data set, or a stream.

        Returns:
            logits, exit and confidence of each row, in input order.
        """
        return self._answer_rows(dataset)[0]

    def _answer_rows(self, dataset) -> tuple[ExitPredictions, list[dict]]:
        """Answers of all rows in input order, and of each row the columns that metrics read."""
        if hasattr(dataset, "set_format"):  # a datasets.Dataset
            dataset = self._remove_unused_columns(dataset, "test")
        accelerator = self.accelerator
        first, step = accelerator.process_index, accelerator.num_processes
        sized = hasattr(dataset, "__len__")
        ids = range(first, len(dataset), step) if sized else None
        rows = ((row, dataset[row]) for row in ids) if sized else islice(enumerate(dataset), first, None, step)
        names = [
            *COLLATED_LABELS,
            *([self.network.main_input_name] if "inputs" in self.args.include_for_metrics else []),
        ]
        kept = []

        def own_rows():
            for index, row in rows:
                kept.append((index, {name: row[name] for name in names if name in row}))
                yield row

        with accelerator.autocast():
            own = predict(
                self.network_for_inference(),
                own_rows(),
                self.args.per_device_eval_batch_size,
                data_collator=self._get_collator_with_removed_columns(self.data_collator, "test"),
                window=max(len(ids), 1) if sized else None,
                progress=not self.args.disable_tqdm and accelerator.is_main_process,
                total=len(ids) if sized else None,
            )
        kept, *answers = zip(*gather_object([(kept, *vars(own).values())]), strict=True)
        kept = [pair for part in kept for pair in part]
        order = torch.tensor([index for index, _ in kept], dtype=torch.int64).argsort()
        answers = (None if parts[0] is None else torch.cat(parts)[order] for parts in answers)
        return ExitPredictions(*answers), [kept[place][1] for place in order.tolist()]

    def network_for_inference(self) -> EarlyExitMixin:
        """The network in eval mode on the device; of a sharded one a whole copy, which all processes must ask for."""
        network = self.network
        return (whole_copy(network) if is_sharded(network) else network.to(self.args.device)).eval()

    @renamed_argument("calibration_data", "calibration_dataset")
    def calibrate(self, calibration_dataset=None, cost: str = "operations", latency_batch_size: int = 1, **settings):
        """Choose an exit policy on rows that were used for nothing else. The policy is returned, not set.

        Args:
            calibration_dataset: rows as `evaluate` takes them.
            cost: `operations`, or `latency`, measured on the model's device.
            latency_batch_size: examples that run together when latency is measured.
            **settings: of `een_hf.calibrate`, for example `target_cost=0.5`, or `max_risk=0.02,
                risk="consistency"`.

        Returns:
            the policy and its results on these rows; set it with `model.set_exit_policy(report.policy)`.

        Raises:
            ExitConfigurationError: as `een_hf.calibrate`.
        """
        from ..calibration import calibrate

        decides = {name: settings[name] for name in ("criterion", "params") if name in settings}
        costs, _ = self.costs_of(calibration_dataset, cost, latency_batch_size, **decides)
        prediction = self.predict_exits(calibration_dataset, "calibration")
        config = self.network.config
        settings.setdefault("problem_type", resolve_problem_type(config.problem_type, config.num_labels))
        return calibrate(prediction.predictions, prediction.label_ids, costs, **settings)

    def costs_of(
        self, dataset, cost: str = "operations", latency_batch_size: int = 1, **decides
    ) -> tuple[ExitCosts, dict | None]:
        """The relative cost of every exit at the mean length of texts, or at the size of images.

        Args:
            dataset: encoded rows.
            cost: `operations`, or `latency`, measured on the model's device and in its precision.
            latency_batch_size: examples that run together when latency is measured.
            **decides: `criterion` and `params` of the decisions that are measured.

        Returns:
            the costs, the same in all processes; and device, batch size and time of the measurement, `None` for
            operations.
        """
        unit, size = CostUnit(cost), cost_inputs(dataset)
        if unit == CostUnit.OPERATIONS:
            return relative_costs(self.network, **size), None
        model = self.network_for_inference()
        with self.accelerator.autocast():
            measured = [relative_latencies(model, batch_size=latency_batch_size, **decides, **size)]
        return broadcast_object_list(measured)[0]

    def _metrics_of_exits(self, prediction: EvalPrediction) -> dict[str, float]:
        """`exit{k}_loss` and `exit{k}_<metric>` for every exit, `<metric>` for the last."""
        exit_logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        with torch.no_grad():
            losses = self._all_losses(exit_logits, labels, num_items_in_batch=(labels != -100).sum())
        metrics, last = {}, {}
        for index, own in enumerate(losses.unbind(1)):
            metrics[f"exit{index + 1}_loss"] = own.mean().item()
            if self.task_metrics is not None:
                last = self._metrics_of(exit_logits[:, index], labels, own, prediction.inputs)
                metrics.update({f"exit{index + 1}_{name}": value for name, value in last.items()})
        return {**metrics, **last}

    def _metrics_of(
        self, logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, inputs
    ) -> dict[str, float]:
        """What `compute_metrics` says of one exit's logits, (num_rows, num_labels), given what it asked for."""
        if self.logits_for_metrics is not None:
            logits = self.logits_for_metrics(logits, labels)
        given = {"inputs": inputs} if "inputs" in self.args.include_for_metrics else {}
        if "loss" in self.args.include_for_metrics:
            given["losses"] = losses.numpy()
        return self.task_metrics(EvalPrediction(nested_numpify(logits), labels.numpy(), **given))


def _pad(values: list) -> np.ndarray:
    """Stack arrays of several lengths, the shorter filled up with -100, as `Trainer` does."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(value) for value in values], True, -100).numpy()
