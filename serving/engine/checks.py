"""What an engine refuses of a request when it arrives. Knows no JAX."""

from kvcache.blocks import BlockKey, page_keys
from kvcache.layout import KVLayout
from serving.engine.errors import RequestRefusedError
from serving.request import Request


def check_lengths(request: Request, emitted: int, layout: KVLayout, max_model_len: int) -> None:
    """Raises `RequestRefusedError` where a request can never be served, whatever else the engine has to do.

    Args:
        request: as it arrived.
        emitted: tokens that the request has generated elsewhere.
        layout: of the pool, all of which the request may use.
        max_model_len: most tokens of a sequence, prompt and output.
    """
    prompt, most = len(request.prompt), request.sampling.max_tokens
    if not prompt:
        raise RequestRefusedError("the prompt has no tokens; send at least one.")
    if emitted >= most:
        raise RequestRefusedError(f"{emitted} tokens were emitted of `max_tokens` {most}; nothing is left to generate.")
    # The last token needs no KV, so a prompt may leave room for exactly one output token.
    total = prompt + most
    if total > max_model_len:
        raise RequestRefusedError(
            f"{prompt} prompt tokens + max_tokens {most} = {total} exceed the model length {max_model_len}; "
            f"shorten the prompt or lower `max_tokens` to at most {max(max_model_len - prompt, 0)}."
        )
    needed = layout.pages_for(total - 1)
    if needed > layout.num_pages:
        raise RequestRefusedError(
            f"{total} tokens need {needed} pages of {layout.page_size} tokens, the pool has {layout.num_pages}; "
            "shorten the request or give the engine more KV memory."
        )


def prompt_keys(request: Request, page_size: int, root: BlockKey) -> list[BlockKey]:
    """Returns the keys of the prompt's full pages: those that the request brought, else hashed here, once.

    Raises:
        RequestRefusedError: the request brought keys of something else than its full pages.
    """
    if not request.keys:
        return page_keys(request.prompt, page_size, root)
    keys = [key for key in request.keys if isinstance(key, bytes)]
    full = len(request.prompt) // page_size
    if not len(keys) == len(request.keys) == full:
        raise RequestRefusedError(
            f"`keys` has {len(request.keys)} entries, {len(keys)} of them bytes; send the keys of all {full} full "
            f"pages of {page_size} tokens, or none."
        )
    return keys
