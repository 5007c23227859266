"""Converts types of the domain and the services to the responses of /api/peft."""

from dataclasses import asdict
from typing import Any

from api import peft_schemas as schemas
from domain.configure import Configuration
from domain.peft.algorithms import AlgorithmSpec
from domain.peft.config import PeftConfig
from domain.peft.use_cases import UseCase
from services.peft_service import LoadedModel, PeftService
from store.records import to_text


def algorithm_view(spec: AlgorithmSpec, peft: PeftService) -> schemas.AlgorithmInfo:
    """Describe a method as it is on this machine."""
    configuration = peft.configure(spec.id, None, {})
    properties = PeftConfig.model_json_schema()["properties"]
    constraints = [f"{name} is {value!r}: {spec.reasons[name]}" for name, value in spec.fixed.items()]
    for name, refused in spec.refused.items():
        constraints += [f"{name}={value!r} is refused: {reason}" for value, reason in refused.items()]
    constraints.append("bias is 'none': a base's biases are shared by every adapter on it")
    return schemas.AlgorithmInfo(
        id=spec.id,
        name=spec.name,
        summary=spec.summary,
        paper=spec.paper,
        extra=spec.extra,
        parameters=[_parameter(name, schema, configuration) for name, schema in properties.items()],
        constraints=constraints,
        memory=spec.memory,
        speed=spec.speed,
        available=True,
        unavailable_reason=None,
    )


def _parameter(name: str, schema: dict[str, Any], configuration: Configuration) -> schemas.ParameterInfo:
    variants = [variant for variant in schema.get("anyOf", [schema]) if variant.get("type") != "null"]
    bounds = variants[0]
    choices = [choice for variant in variants for choice in _choices(variant)]
    return schemas.ParameterInfo(
        name=name,
        type=" | ".join(str(variant.get("type", "string")) for variant in variants),
        default=configuration.choices[name].value,
        minimum=bounds.get("minimum", bounds.get("exclusiveMinimum")),
        maximum=bounds.get("maximum", bounds.get("exclusiveMaximum")),
        choices=choices or None,
        description=schema.get("description", ""),
    )


def _choices(schema: dict[str, Any]) -> list[Any]:
    if "enum" in schema:
        return list(schema["enum"])
    return [schema["const"]] if "const" in schema else []


def use_case_view(case: UseCase) -> schemas.UseCaseInfo:
    """Describe a purpose."""
    return schemas.UseCaseInfo(id=case.id, name=case.name, summary=case.summary, defaults=dict(case.defaults))


def configuration_view(body: schemas.ConfigureRequest, configuration: Configuration) -> schemas.ConfigureResponse:
    """Show a configuration with its reasons."""
    return schemas.ConfigureResponse(
        algorithm=body.algorithm,
        use_case=body.use_case,
        model_id=body.model_id,
        config=configuration.config,
        parameters={
            name: schemas.ChosenParameter(value=choice.value, source=choice.source, reason=choice.reason)
            for name, choice in configuration.choices.items()
        },
        fit=None if configuration.fit is None else schemas.ConfigurationFit.model_validate(asdict(configuration.fit)),
        trained=None
        if configuration.trained is None
        else [schemas.TrainedModules.model_validate(asdict(item)) for item in configuration.trained],
    )


def loaded_model_view(model: LoadedModel) -> schemas.LoadedModelResponse:
    """Show a loaded model as it is now."""
    base, loaded, last_used_at = model.base, model.base.loaded, model.base.use.last_at
    error = base.error
    return schemas.LoadedModelResponse(
        id=model.id,
        model_id=model.model_id,
        revision=model.revision,
        algorithm=model.algorithm,
        config=model.config,
        engine=base.key.engine,
        engine_reason=base.wanted.engine_reason,
        device=base.key.device,
        state=base.state,
        progress=schemas.Progress.model_validate(base.progress),
        adapters=list(base.adapters),
        parameters=schemas.Parameters(
            total=loaded.total_parameters if loaded is not None else None, trainable=model.trainable_parameters
        ),
        memory=schemas.Memory(estimated_bytes=model.estimated_bytes, measured_bytes=base.memory_bytes),
        loaded_at=to_text(base.loaded_at) if base.loaded_at is not None else None,
        last_used_at=to_text(last_used_at) if last_used_at is not None else None,
        load_s=loaded.load_s if loaded is not None else None,
        engine_pid=base.process.pid if base.process is not None else None,
        error=None
        if error is None
        else schemas.LoadError(
            type=error.slug, message=error.detail, log_tail=error.extras.get("log_tail", base.log_tail())
        ),
    )
