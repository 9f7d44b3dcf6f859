// Writes the dashboards as TypeScript literals for the compiler: of a literal it also refuses fields that nobody knows.
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";

const FOLDER = new URL("../dashboards/", import.meta.url), BUILD = new URL("build/", import.meta.url);

rmSync(BUILD, { recursive: true, force: true });
mkdirSync(BUILD);
for (const name of readdirSync(FOLDER)) {
  const json = readFileSync(new URL(name, FOLDER), "utf8");
  const text = `import type { Dashboard } from "../schema";\nexport const board: Dashboard = ${json}`;
  writeFileSync(new URL(name.replace(".json", ".ts"), BUILD), text);
}
