"""Pushforward's own programs behind the usual dynamic batching: a window of rows, solved to its end.

Everything is as in Pushforward (programs, engine, JSON, uvicorn with uvloop) but for the one thing: rows that
arrive while a batch is under way wait for the last row of that batch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from pushforward.engine.engine import Engine
from pushforward.engine.request import Answer, Chunk, Kind
from pushforward.loading import load_model

WINDOW_S, MOST_ROWS = 0.002, 256


def main() -> None:
    """Serve ``POST /log_density`` with {"x": [[…]], "rtol": …, "atol": …, "logp_atol": …}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--version", type=Path, required=True, help="folder of the model version")
    arguments = parser.parse_args()
    model = load_model(arguments.version)
    queue: asyncio.Queue[tuple[Chunk, asyncio.Future[Answer]]] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batches())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    def solve(batch: list[Chunk]) -> dict[str, Answer]:
        engine = Engine(lambda name, version: model, slots=MOST_ROWS)
        for chunk in batch:
            engine.submit(chunk)
        answers: dict[str, Answer] = {}
        while engine.busy:
            answers |= {answer.id: answer for answer in engine.step()}
        return answers

    async def batches() -> None:
        while True:
            batch = [await queue.get()]
            await asyncio.sleep(WINDOW_S)
            while not queue.empty() and sum(len(chunk.rows) for chunk, _ in batch) < MOST_ROWS:
                batch.append(queue.get_nowait())
            answers = await asyncio.to_thread(solve, [chunk for chunk, _ in batch])
            for chunk, answer in batch:
                answer.set_result(answers[chunk.id])

    @app.post("/log_density")
    async def log_density(request: Request) -> Response:
        query = orjson.loads(await request.body())
        rows = np.array(query["x"], dtype=float)
        answers = []
        for first in range(0, len(rows), MOST_ROWS):
            answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            chunk = Chunk(
                id=str(id(answer)),
                model="",
                version=1,
                kind=Kind.ENCODE,
                density=True,
                rows=rows[first : first + MOST_ROWS],
                rtol=query["rtol"],
                atol=query["atol"],
                logp_atol=query["logp_atol"],
                max_steps=10_000,
            )
            queue.put_nowait((chunk, answer))
            answers.append(answer)
        done = [(await answer).log_density for answer in answers]
        body = orjson.dumps({"log_density": np.concatenate(done)}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")

    uvicorn.run(app, port=arguments.port, loop="uvloop", http="httptools", log_level="warning")


if __name__ == "__main__":
    main()
