/* What stands behind the model that is served, as /v1/models says it: the tags of its registered version. */

import { icon, make } from "./dom.js";
import { label, say } from "./words.js";

const NONE = "none";
const SHORT = 12;

/** A tag that holds JSON; null where it is not there or is none. */
function json(lineage, name) {
  try {
    return JSON.parse(lineage[name] ?? "null");
  } catch {
    return null;
  }
}

const number = (value) => (typeof value !== "number" ? String(value) : Math.abs(value) >= 0.001 || value === 0 ? String(Number(value.toPrecision(4))) : value.toExponential());
const described = (source) => [source?.requirement ?? source?.repo ?? source?.path ?? source?.kind, source?.revision?.slice(0, SHORT)].filter(Boolean).join(" · ");

/** A line of its params a stage, in the order of the DAG. */
const STAGES = {
  base_model: (stage) => [described(stage.source)],
  raw_data: (stage) => [stage.sources?.map((source) => source.name).join(", ")],
  prepare_data: (stage) => [`≤ ${stage.max_prompt_tokens} + ${stage.max_response_tokens} tokens`, `seed ${stage.seed}`],
  train_sft: trained,
  compare: (stage) => [`${stage.num_prompts} × ${stage.num_responses}`, stage.ranked_by?.join(", ")],
  train_reward: trained,
  train_gold: trained,
  train_ppo: (stage) => [...trained(stage), `${stage.num_steps} × ${stage.rollout_batch}`, stage.kl && `KL ${number(stage.kl.init_coef)}`],
  quantize: (stage) => [`${stage.bits} bit`, `group ${stage.group_size}`, stage.languages?.join(", ")],
  evaluate: (stage) => [`${stage.num_prompts} prompts`, `seed ${stage.seed}`],
};

function trained(stage) {
  return [say("method")[stage.method], stage.optimizer && `lr ${number(stage.optimizer.lr)}`, stage.num_epochs && `epochs ${stage.num_epochs}`, `batch ${stage.batch_size}`, stage.parallel?.strategy !== "none" && stage.parallel?.strategy];
}

/** Fill `container` with the lineage of `model`; `copy` is called with a text and the button pressed. */
export function showLineage(container, model, copy) {
  const lineage = model.lineage ?? {};
  const head = make("div", { class: "version" }, make("strong", {}, model.id), make("span", { class: "badge" }, model.version ? say("version", model.version) : say("folder")), status(lineage));
  if (!Object.keys(lineage).length) {
    container.replaceChildren(head, make("p", { class: "hint" }, say("unregistered")));
    return;
  }
  container.replaceChildren(head, facts(model, lineage, copy), ...stages(lineage), ...data(lineage), ...gates(lineage), everything(lineage));
}

function status({ status }) {
  if (status !== "accepted" && status !== "rejected") return "";
  return make("span", { class: `badge ${status === "accepted" ? "good" : "bad"}` }, say(status));
}

function facts(model, lineage, copy) {
  const made = make("dl", { class: "facts" });
  const add = (name, value, extra = null) => {
    if (!value || value === NONE) return;
    const hash = /^[0-9a-f]{20,}(\.dir)?$/.test(value);
    const button = make("button", { type: "button", class: "quiet", onclick: (event) => copy(value, event.currentTarget) }, icon("copy"));
    label(button, "copy");
    const shown = make(hash ? "code" : "span", { title: hash ? value : null }, hash ? value.slice(0, SHORT) : value);
    made.append(make("dt", {}, say(name)), make("dd", {}, shown, extra, hash ? button : null));
  };
  add("revision", lineage["git.revision"], lineage["git.dirty"] === "true" ? make("span", { class: "hint" }, say("uncommitted")) : null);
  add("weights", lineage["dvc.model"]);
  add("preset", lineage["chatloom.preset"]);
  add("base", described(json(lineage, "base_model.source")));
  add("context", model.context && say("tokens", model.context));
  return made;
}

const section = (name, ...children) => [make("h3", {}, say(name)), ...children];

function stages(lineage) {
  const params = json(lineage, "params") ?? {};
  const found = Object.entries(STAGES).filter(([name]) => params[name]);
  if (!found.length) return [];
  const line = ([name, describe]) => {
    const parts = describe(params[name]).filter(Boolean);
    return make("li", {}, make("strong", {}, say("stageNames")[name]), make("code", {}, name), make("span", {}, parts.join(" · ")));
  };
  return section("stages", make("ol", { class: "stages" }, ...found.map(line)));
}

function data(lineage) {
  const sources = json(lineage, "data.sources");
  if (!Array.isArray(sources) || !sources.length) return section("data", make("p", { class: "hint" }, say("none")));
  const line = ({ name, from, license }) => make("li", {}, make("strong", {}, name), make("span", { class: "badge" }, license), make("span", { class: "from" }, from ?? ""));
  return section("data", make("ul", { class: "sources" }, ...sources.map(line)));
}

function gates(lineage) {
  const verdicts = json(lineage, "gates");
  if (!Array.isArray(verdicts) || !verdicts.length) return [];
  const line = ({ metric, value, bound, verdict, note }) =>
    make(
      "li",
      { class: verdict === "pass" ? "good" : verdict === "warn" ? "warn" : "bad" },
      icon(verdict === "pass" ? "check" : "warning"),
      make("span", { title: note || null }, metric),
      make("span", { class: "value" }, value === null ? (note ?? "") : number(value)),
      make("span", { class: "bound" }, value === null ? "" : bound),
    );
  return section("gates", make("ul", { class: "gates" }, ...verdicts.map(line)));
}

function everything(lineage) {
  const names = Object.keys(lineage).sort();
  const rows = names.flatMap((name) => {
    const value = json(lineage, name);
    const text = typeof value === "object" && value !== null ? JSON.stringify(value, null, 2) : lineage[name];
    return [make("dt", {}, name), make("dd", {}, make("pre", {}, text))];
  });
  return make("details", {}, make("summary", {}, say("raw")), make("dl", { class: "raw" }, ...rows));
}
