"""Files of the Hugging Face hub, fetched only when a name asks for it: `hf://OWNER/NAME`."""

from pathlib import Path

from fastjepa.checkpoint.huggingface import CONFIG, INDEX, WEIGHTS, shards
from fastjepa.checkpoint.tensor_file import CheckpointError

HUB = "hf://"


def fetch(name: str) -> Path:
    """The local copy of a hub model's folder, or of one file of it, fetched by huggingface_hub.

    `name` is `OWNER/NAME` (config.json and its safetensors) or `OWNER/NAME/FILE`. Raises
    CheckpointError without that package, or for what the hub does not have.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    except ImportError as error:
        raise CheckpointError(
            f"{HUB}{name}: needs the package huggingface_hub: pip install 'fastjepa[hub]'"
        ) from error
    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    if not owner or not repo:
        raise CheckpointError(f"{HUB}{name}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/FILE")
    where = f"{owner}/{repo}"
    try:
        if file:
            return Path(hf_hub_download(where, file))
        folder = Path(hf_hub_download(where, CONFIG)).parent
        try:
            index = Path(hf_hub_download(where, INDEX))
        except EntryNotFoundError:
            hf_hub_download(where, WEIGHTS)
        else:
            for shard in shards(index):
                hf_hub_download(where, shard)
        return folder
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{HUB}{name}: cannot be fetched: {reason}") from error
