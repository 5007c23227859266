"""The `prepare_pickled` command: pickled weights become a normal local model."""

import pickle
import re
import shutil
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from core.files import fsync_folder, plain_files
from domain.protocol import PreparePickled, Progress
from domain.results import Prepared
from engine.channel import Channel
from engine.errors import BadModel
from engine.model_class import attention_of, model_class
from engine.tokenizer_folder import save_tokenizer

_REFUSED = re.compile(r"(?i)unsupported (?:global|class|operand)[^\n]{0,100}")


def prepare_pickled(command: PreparePickled, channel: Channel) -> Prepared:
    """Read pickled weights with torch's restricted unpickler and write them as safetensors with their tokenizer.

    The unpickler makes tensors and plain containers only (`torch.load(weights_only=True)`): any other class or
    function that the file names is an error, and is not imported.

    Raises:
        BadModel: The files hold something else than weights, or not those of their config.
    """

    def progress(stage: str, fraction: float) -> None:
        channel.emit(Progress(request_id=command.request_id, stage=stage, fraction=fraction))

    source, output = Path(command.source_path), Path(command.output_path)
    progress("reading weights", 0.1)
    try:
        chosen, config = model_class(AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True))
        model = chosen.from_pretrained(
            source,
            config=config,
            dtype="auto",
            attn_implementation=attention_of(chosen),
            use_safetensors=False,
            weights_only=True,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises running it all the same.
        named = _REFUSED.search(str(error))
        what = named[0] if named else "they hold something else than tensors"
        raise BadModel(f"the pickled weights of {command.model_id} are not read: {what}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadModel(f"the pickled weights of {command.model_id} cannot be read: {str(error)[:1000]}") from error
    model.config._name_or_path = command.model_id
    temporary = output.with_name(f".{output.name}.tmp")  # hidden: a folder in the making is no model
    shutil.rmtree(temporary, ignore_errors=True)
    progress("writing", 0.7)
    output.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(temporary)
    save_tokenizer(tokenizer, temporary)
    for _, file in plain_files(temporary):
        file.chmod(0o600)
    temporary.replace(output)
    fsync_folder(output.parent)
    progress("ready", 1.0)
    return Prepared(path=str(output))
