// Prisma's schema engine without its native binaries, for `prisma db push` of LiteLLM's schema: scripts/litellm_fixtures.py installs it.
import { PrismaPg } from "@prisma/adapter-pg";
import { defineConfig } from "prisma/config";

/** Prisma's adapter, which by itself reads no column of type "char" or name, and splits scripts at each semicolon. */
async function adapter() {
  const factory: any = new PrismaPg({ connectionString: process.env.DATABASE_URL });
  const connect = factory.connect.bind(factory);
  factory.connect = async () => {
    const connected: any = await connect();
    const query = connected.client.query.bind(connected.client);
    connected.client.query = async (...call: any[]) => {
      const result = await query(...call);
      for (const field of result.fields ?? []) if ([18, 19].includes(field.dataTypeID)) field.dataTypeID = 25;
      return result;
    };
    connected.executeScript = (script: string) => connected.client.query(script);
    return connected;
  };
  return factory;
}

export default defineConfig({ schema: "schema.prisma", experimental: { adapter: true }, engine: "js", adapter });
