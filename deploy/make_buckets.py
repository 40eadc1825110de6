"""`python deploy/make_buckets.py NAME...`: make the buckets that are not there, once the object store answers.

Address and keys come from the environment, as for every program that speaks S3 (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY).
"""

from __future__ import annotations

import sys
import time

import boto3
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

SECONDS, BETWEEN = 120.0, 2.0


def make_buckets(*names: str) -> None:
    client = boto3.client("s3")
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for name in sorted(set(names) - there):
                client.create_bucket(Bucket=name)
            return
        except (ConnectionError, HTTPClientError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(BETWEEN)


if __name__ == "__main__":
    make_buckets(*sys.argv[1:])
