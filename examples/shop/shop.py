"""A shop to copy from: logins, limits, a cached table, and a lock around a payment. README.md says how to run it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TypedDict

import psycopg2
from flask import Flask, Response, abort, redirect, render_template, request, session
from flask.typing import ResponseReturnValue
from psycopg2.extensions import connection
from werkzeug.security import check_password_hash, generate_password_hash

from govredis import GovRedis, LockTimeout
from govredis.contrib.flask import FlaskGovRedis

HTTPS = os.environ.get("SHOP_OVER_HTTP") != "1"  # browsers send Secure cookies over https alone

site = Flask(__name__)
site.config.from_mapping(
    SECRET_KEY=os.environ["SHOP_SECRET_KEY"],  # signs the forms' tokens: the same in all processes
    SESSION_COOKIE_SECURE=HTTPS,
    SESSION_COOKIE_SAMESITE="Lax",
    GOVREDIS_SESSION_COOKIE_SECURE=HTTPS,
)
gov = GovRedis.from_env()  # REDIS_URL, GOVREDIS_DATABASE_URL, ...
ext = FlaskGovRedis(site, gov)
products = gov.cache("product", ttl=600)  # of a table: schema.sql has each change of it, by any program, told to Redis


class Product(TypedDict):
    id: int
    name: str
    cents: int
    stock: int


def connect() -> closing[connection]:
    return closing(psycopg2.connect(os.environ["GOVREDIS_DATABASE_URL"]))


def load_products(ids: Iterable[str]) -> dict[str, Product]:
    with connect() as db, db.cursor() as cursor:
        cursor.execute("SELECT id, name, cents, stock FROM products WHERE id = ANY(%s::int[])", (list(ids),))
        return {str(row[0]): Product(id=row[0], name=row[1], cents=row[2], stock=row[3]) for row in cursor}


@site.get("/")
def index() -> str:
    with connect() as db, db.cursor() as cursor:
        cursor.execute("SELECT id FROM products ORDER BY id")
        ids = [row[0] for row in cursor]
    found = products.get_many(ids, load_products)
    return render_template("index.html", products=found.values(), agent=ext.current_agent())


def failed(response: Response) -> bool:
    return response.status_code == 403


NOBODY = generate_password_hash(secrets.token_hex())  # so that an unknown name takes as long as a wrong password


@site.get("/login")
def login_page() -> str:
    return render_template("login.html")


@site.post("/login")
@ext.rate_limited("20/minute", key=lambda: request.remote_addr, operation="login_address", count_when=failed)
@ext.rate_limited("5/minute", key=lambda: request.form["user"], operation="login_user", count_when=failed)
def login() -> ResponseReturnValue:
    user = request.form["user"]
    with connect() as db, db.cursor() as cursor:
        cursor.execute("SELECT password FROM customers WHERE name = %s", (user,))
        row = cursor.fetchone()
    if not check_password_hash(row[0] if row else NOBODY, request.form.get("password", "")):
        return render_template("login.html", error="wrong name or password"), 403
    session.clear()  # the token from before the login is worth nothing
    ext.login(user)
    return redirect("/")


@site.post("/logout")
def logout() -> ResponseReturnValue:
    session.clear()
    ext.logout()
    return redirect("/")


@site.errorhandler(401)
def to_login(_: Exception) -> ResponseReturnValue:
    return redirect("/login")


def charge(customer: str | None, cents: int) -> None:
    """In the place of your payment provider: no rollback undoes a charge, so nobody may pay for the item of another."""
    with connect() as db, db, db.cursor() as cursor:
        cursor.execute("INSERT INTO payments (customer, cents) VALUES (%s, %s)", (customer, cents))


@site.post("/products/<int:product_id>/order")
@ext.login_required
@ext.rate_limited("10/hour", key=ext.current_agent, operation="order")
def order(product_id: int) -> ResponseReturnValue:
    customer = ext.current_agent()
    with gov.locks.acquire(f"product:{product_id}", timeout=5) as held:  # no transaction stays open while somebody pays
        product = load_products([str(product_id)]).get(str(product_id))  # the row: a cached one may be seconds old
        if product is None:
            abort(404)
        if not product["stock"]:
            return render_template("message.html", message=f"{product['name']}: sold out"), 409
        held.raise_if_lost()  # the last moment at which nothing has happened yet
        charge(customer, product["cents"])
        with connect() as db, products.after_commit(db) as tx, db.cursor() as cursor:
            cursor.execute("UPDATE products SET stock = stock - 1 WHERE id = %s", (product_id,))
            cursor.execute("INSERT INTO orders (customer, product) VALUES (%s, %s)", (customer, product_id))
            tx.invalidate(product_id)  # the buyer sees the new stock at once
    return redirect("/")


@site.errorhandler(LockTimeout)
def busy(_: LockTimeout) -> ResponseReturnValue:
    message = "Many buy this just now. You have paid nothing: please try again."
    return render_template("message.html", message=message), 503, {"Retry-After": "5"}


@site.context_processor
def form_token() -> dict[str, object]:
    return {"token": lambda: session.setdefault("token", secrets.token_urlsafe())}


@site.before_request
def check_token() -> None:  # SameSite stops the forms of other sites; the token stops those of hosts beside ours
    sent, wanted = request.form.get("token", ""), session.get("token", "")
    if request.method == "POST" and not (wanted and secrets.compare_digest(sent.encode(), wanted.encode())):
        abort(400, "The form is too old. Go back, reload the page and try again.")


@site.cli.command("create-tables")
def create_tables() -> None:
    with connect() as db, db, db.cursor() as cursor:
        cursor.execute(Path(__file__).with_name("schema.sql").read_text())
        for name in "ada", "bob":
            hashed = generate_password_hash("sesame")
            cursor.execute("INSERT INTO customers VALUES (%s, %s) ON CONFLICT DO NOTHING", (name, hashed))
