"""What can be configured about a TGI server, since it does not tell?"""

from msgspec import Struct


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    `options` of an upstream with the adapter `tgi`.

    `loras`: the adapters it has loaded; a target's `model` that is none of them is the base model. `vision`: the model
    takes images, as `data:` URLs; `fetch_images`: others too, which TGI then fetches. `prefill_logprobs`: it was
    started with `--enable-prefill-logprobs`.
    """

    loras: list[str] = []
    vision: bool = False
    fetch_images: bool = False
    prefill_logprobs: bool = False
