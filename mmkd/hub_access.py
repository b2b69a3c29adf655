"""Whether the Hub answers, asked once and briefly."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request

from huggingface_hub import constants

HUB_TIMEOUT_SECONDS = 5


def require_hub() -> None:
    """Look once, because the Hub's client retries for most of a minute where there is no network.

    Raises:
        OSError: the Hub does not answer, or fails.
    """
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{constants.ENDPOINT} does not answer: {error}") from error
