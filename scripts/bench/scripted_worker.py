"""A worker that answers at once, so that what is left of a request's time is the controller's: for ``serve.py``.

python scripts/bench/scripted_worker.py PORT [CHUNKS]
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from model.serve.protocol import Chunk, WorkerStatus
from model.serve.running import run_app

MODEL = "scripted"


def make_app(chunks: int) -> FastAPI:
    """The routes that a controller asks."""
    app = FastAPI()
    pieces = [Chunk(text="x" * number, answer="x" * number).encode() for number in range(1, chunks + 1)]

    @app.post("/worker_get_status")
    async def status() -> WorkerStatus:
        return WorkerStatus(model_names=[MODEL])

    @app.post("/worker_generate_stream")
    async def generate(request: Request) -> StreamingResponse:
        await request.body()

        async def stream() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        return StreamingResponse(stream(), media_type="application/octet-stream")

    return app


if __name__ == "__main__":
    run_app(make_app(int(sys.argv[2]) if len(sys.argv) > 2 else 1), "127.0.0.1", int(sys.argv[1]))
