"""The few options of curl that the README uses, for machines that have Python and no curl."""

import argparse
import sys

import httpx


def main() -> None:
    parser = argparse.ArgumentParser(prog="curl")
    parser.add_argument("url")
    parser.add_argument("-s", "--silent", action="store_true")
    parser.add_argument("-S", "--show-error", action="store_true")
    parser.add_argument("-f", "--fail", action="store_true")
    parser.add_argument("-X", "--request")
    parser.add_argument("-H", "--header", action="append", default=[])
    parser.add_argument("-d", "--data")
    parser.add_argument("--json")
    option = parser.parse_args()

    headers, body, method = {}, option.data, "GET"
    if option.data is not None:
        headers, method = {"content-type": "application/x-www-form-urlencoded"}, "POST"
    if option.json is not None:
        headers, method = {"content-type": "application/json", "accept": "application/json"}, "POST"
        body = option.json
    for line in option.header:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    url = option.url if "://" in option.url else f"http://{option.url}"
    answer = httpx.request(option.request or method, url, headers=headers, content=body, timeout=60)
    if option.fail and answer.is_error:
        sys.exit(22)
    sys.stdout.write(answer.text)


if __name__ == "__main__":
    main()
