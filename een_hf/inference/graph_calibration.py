"""Calibration of an int8 graph on its own answers."""

from dataclasses import replace

import numpy as np

from ..calibration import calibrate, check_risk, check_target_cost, disagreement, risk_p_value, rows_needed
from ..calibration.risk import split_rows
from ..errors import ExportError
from ..evaluation import ExitCosts, cost_inputs, relative_costs
from ..models import EarlyExitMixin, ExitConfigurationError, ExitPolicy
from ..models.criteria import fitting_criteria, get_criterion, resolve_problem_type
from .predict import predict
from .quantization import REFERENCE, CalibratedGraph, GraphCalibration
from .rows import WHERE_MISSING, model_inputs, pad_rows, rows_of, tokenized_rows
from .runner import MAX_ROWS


RISK = "consistency"


class GraphCalibrator:
    """The checked rows of a `GraphCalibration`, with the answers of the float32 model's last exit.

    Args:
        settings: rows and target.
        model: in float32 on the CPU; its policy is not used.

    Raises:
        ExitConfigurationError: too few rows for `max_risk`, or a target or criterion that does not fit.
    """

    def __init__(self, settings: GraphCalibration, model: EarlyExitMixin):
        self.settings, config = settings, model.config
        self.problem_type = resolve_problem_type(config.problem_type, config.num_labels)
        own = model.get_exit_policy()
        self.criterion, self.params = settings.exit_criterion, {}
        if self.criterion is None:
            fitting = fitting_criteria(self.problem_type)
            self.criterion = own.criterion if own else "confidence" if "confidence" in fitting else fitting[0]
        if own and own.criterion == self.criterion:
            self.params = own.params
        get_criterion(self.criterion).check(self.problem_type)
        rows = rows_of(settings.rows)
        if settings.tokenizer is not None:
            rows = tokenized_rows(rows, None, settings.tokenizer, MAX_ROWS)
        self.rows = [*model_inputs(rows, model)]
        if not self.rows:
            raise ExitConfigurationError("There are no calibration rows.")
        if settings.max_risk is not None:
            check_risk(RISK, self.problem_type, labelled=False)
            _, needed = rows_needed(settings.max_risk, settings.risk_confidence)
            if len(self.rows) < needed:
                raise ExitConfigurationError(
                    f"{len(self.rows)} calibration rows are too few: --max_risk {settings.max_risk:g} with "
                    f"--risk_confidence {settings.risk_confidence:g} takes at least {needed}. Give more rows, a "
                    "larger --max_risk, or a lower --risk_confidence."
                )
        self.costs: ExitCosts = relative_costs(model, **cost_inputs(self.rows))
        if settings.target_cost is not None:
            check_target_cost(settings.target_cost, self.costs)
        self.config = config
        model.set_exit_policy(None)
        self.reference = predict(model, self.rows, progress=False).logits.numpy()

    def choose(self, session: "onnxruntime.InferenceSession") -> ExitPolicy:  # noqa: F821
        """Choose the policy of an int8 graph.

        Args:
            session: session of a graph with all exits.

        Returns:
            the calibrated policy.

        Raises:
            ExportError: no policy can be certified.
        """
        settings, (exit_logits,) = self.settings, self.answers(session)
        report = calibrate(
            exit_logits,
            None,
            self.costs,
            criterion=self.criterion,
            params=self.params,
            target_cost=settings.target_cost,
            max_risk=settings.max_risk,
            risk=None if settings.max_risk is None else RISK,
            risk_confidence=settings.risk_confidence,
            problem_type=self.problem_type,
            seed=settings.seed,
            reference=self.reference,
        )
        if report.policy is None:
            raise ExportError(
                f"{report.message} The int8 graph is compared with the float32 model, so that without early exits its "
                "answers differ too: nothing is written. Give a larger --max_risk or more rows."
            )
        about = {"quantize": "int8", "reference": REFERENCE}
        policy = replace(report.policy, calibrated_for={**report.policy.calibrated_for, **about})
        return replace(policy, guarantee=policy.guarantee and {**policy.guarantee, **about})

    def measure(self, session: "onnxruntime.InferenceSession", policy: ExitPolicy) -> CalibratedGraph:  # noqa: F821
        """Run a dynamic int8 graph on the rows, and check the guarantee on its answers.

        Args:
            session: session of the graph.
            policy: policy of the graph.

        Returns:
            the policy, with the graph's cost and agreement.

        Raises:
            ExportError: the answers of the graph do not confirm the guarantee.
        """
        logits, exit_index = self.answers(session)
        guarantee, agreement = policy.guarantee, None
        if self.problem_type != "regression":
            differs = disagreement(logits, self.reference, self.problem_type)
            agreement = float(1 - differs.mean())
        if guarantee is not None:
            losses = differs[split_rows(len(logits), self.settings.seed)[1]]
            p_value = risk_p_value(losses, guarantee["limit"])
            if p_value > 1 - guarantee["confidence"]:
                raise ExportError(
                    f"The dynamic int8 graph shows {losses.sum():g} errors in {len(losses)} certifying rows, too many "
                    f"to certify a risk of at most {guarantee['limit']:g}: nothing is written."
                )
            policy = replace(policy, guarantee={**guarantee, "errors": float(losses.sum()), "p_value": p_value})
        fractions = np.bincount(exit_index, minlength=len(self.costs)) / len(exit_index)
        cost = float(fractions @ self.costs.of_policy(policy))
        return CalibratedGraph(policy, len(logits), cost, fractions.tolist(), agreement)

    def answers(self, session: "onnxruntime.InferenceSession") -> list[np.ndarray]:  # noqa: F821
        """The outputs of a graph for all rows, which run one at a time."""
        names = [given.name for given in session.get_inputs()]
        found = [session.run(None, self._feed(row, names)) for row in self.rows]
        return [np.concatenate(output) for output in zip(*found, strict=True)]

    def _feed(self, row: dict, names: list[str]) -> dict[str, np.ndarray]:
        inputs = {name: value.numpy() for name, value in pad_rows([row], self.config).items()}
        for name in names:
            if name not in inputs:
                inputs[name] = np.full_like(inputs["input_ids"], WHERE_MISSING[name])
        return {name: inputs[name] for name in names}
